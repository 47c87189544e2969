"""Tools that explain adapters and look after them: each file one verb, most of them `lora-vision` commands."""
