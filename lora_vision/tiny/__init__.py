"""The embedded base: a small Stable Diffusion that was really trained, and what it knows.

``base/`` holds the weights in the diffusers folder layout, made by ``train_scripts/train_tiny_base.py``;
``subjects`` lists the nouns, styles and colours that its prompts understand; ``render`` draws the pictures.
"""
