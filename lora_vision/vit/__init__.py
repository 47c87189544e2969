"""Vision transformers for a domain of one's own: pictures in class folders in, one adapter with its head out.

``backbone`` loads the transformer, ``pictures`` the data, ``classifier`` is the trained whole; ``fitting`` trains it,
``metrics`` and ``evaluation`` say how good it is, ``methods`` what LoRA, a linear probe and full fine-tuning each give.
"""
