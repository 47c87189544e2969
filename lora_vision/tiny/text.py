"""The embedded base's tokenizer and text encoder and how they are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_vision.tiny.dataset import packages, pictures, rows_by_share
from lora_vision.tiny.stages import Run, decayed, set_rate

TOKENS = 20


def new_tokenizer(work: Path) -> CLIPTokenizer:
    """Returns a CLIP tokenizer whose pairs were learnt on the captions and on emoji names and tags."""
    folder = work / "tokenizer"
    if not folder.exists():
        base = packages(work).parent
        entries = json.loads((base / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
        words = [w for e in entries for w in (e["label"], *e.get("tags", ()))]
        learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
        learner.pre_tokenizer = Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), behavior="removed", invert=True)
        trainer = BpeTrainer(vocab_size=2300, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
        texts = [text.lower() for text in (*pictures(work).captions, *words) if text.isascii()]
        learner.train_from_iterator(texts, trainer)
        merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
        letters = sorted(ByteLevel.alphabet())
        pieces = [*letters, *(f"{c}</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
        vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS).save_pretrained(
            folder
        )
    return cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(folder))


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns an untrained CLIP text encoder, 128 wide, three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            projection_dim=128,
        )
    )


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns token ids [B, 20]."""
    out = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return cast(Tensor, out.input_ids)


def train_text(work: Path, total: int) -> None:
    """Trains the text encoder to tell the pictures apart (InfoNCE) and to say how they look (regression of 16 px).

    Trained through the UNet alone it learns nothing in the time there is.
    """
    torch.manual_seed(3)
    run, data, tokenizer = Run(work, "text"), pictures(work), new_tokenizer(work)
    model, rng = new_text_encoder(tokenizer), np.random.default_rng(3)
    look = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.GELU(), nn.Linear(256, 128))
    heads = nn.ModuleDict({"pooled": nn.Linear(128, 768), "last": nn.Linear(128, 768), "look": look})
    trained = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    ids = tokens(tokenizer, data.captions)
    same = {text: i for i, text in enumerate(dict.fromkeys(data.captions))}
    group = torch.tensor([same[text] for text in data.captions])
    order = rows_by_share(data, rng, 64)
    for step in range(total):
        set_rate(optimizer, decayed(step, total, 1e-3))
        rows = next(order)
        small = F.avg_pool2d(data.batch(rows), 4)
        out = model(ids[rows])
        want = small.flatten(1)
        regression = F.mse_loss(heads["pooled"](out.pooler_output), want) + F.mse_loss(
            heads["last"](out.last_hidden_state[:, -1]), want
        )
        a, b = F.normalize(out.pooler_output, dim=-1), F.normalize(heads["look"](small), dim=-1)
        logits = a @ b.T * 15
        positive = (group[rows][:, None] == group[rows][None]).float()
        target = positive / positive.sum(1, keepdim=True)
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        (2 * regression + 0.5 * contrast).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == total - 1:
            hits = positive.gather(1, logits.argmax(1, keepdim=True)).mean()
            run.note(step, regression=regression.item(), contrast=contrast.item(), top1=hits.item())
    model.save_pretrained(work / "text_encoder")
