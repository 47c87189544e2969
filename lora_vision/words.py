"""New words for a base: token embeddings that are learnt with an adapter (pivotal tuning) and travel in its file.

A word of several tokens is spelt as diffusers spells a textual inversion: "inkish inkish_1 inkish_2", which its
pipelines write themselves where a prompt says "inkish". In a file the embeddings are bundled as A1111 and OneTrainer do
it (`bundle_emb.inkish...`), in an adapter they are extras (`embedding.inkish.text_encoder` [N tokens, width]).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError


def spelt(word: str, count: int) -> list[str]:
    """The tokens of a word: "inkish", "inkish_1", ..."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def teach(parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], adapters: Iterable[Adapter]) -> list[str]:
    """The words that the text encoders know from now on: those that the adapters bring along.

    Args:
        parts: Text encoders by name; others are left alone.
        tokenizers: Theirs, under the same names.
        adapters: Whose embeddings are added to the encoders' tables; what was there stays as it is.

    Raises:
        AdapterError: A word is one that the base knows already, or its embeddings do not fit; nothing was changed.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for adapter in adapters:
        for name, rows in adapter.extras.items():
            kind, _, rest = name.partition(".")
            word, _, part = rest.rpartition(".")
            if kind != "embedding" or part not in tokenizers:
                continue
            width = _table(parts[part]).weight.shape[1]
            if rows.dim() != 2 or rows.shape[1] != width:
                raise AdapterError(f"the embeddings of {word!r} are {tuple(rows.shape)}; {part} wants [N, {width}]")
            _check_new(word, len(rows), tokenizers[part])
            found[word, part] = rows
    for (word, part), rows in found.items():
        _write(parts[part], tokenizers[part], word, rows)
    return sorted({word for word, _ in found})


def _table(encoder: Any) -> nn.Embedding:
    table: nn.Embedding = encoder.get_input_embeddings()
    return table


def _check_new(word: str, count: int, tokenizer: Any) -> None:
    """Insist on a word that the base does not have already."""
    known = {token.removesuffix("</w>") for token in tokenizer.get_vocab()} - set(tokenizer.added_tokens_encoder)
    taken = known & set(spelt(word, count))
    if taken or not word or word != word.lower() or any(letter.isspace() for letter in word):
        raise AdapterError(f"{word!r} cannot be a new word: give one in lower case that the base does not know")


@torch.no_grad()
def _write(encoder: Any, tokenizer: Any, word: str, rows: Tensor) -> None:
    """Add a word's tokens to a tokenizer, and their embeddings [N, width] to its encoder's table."""
    tokens = spelt(word, len(rows))
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    table = _table(encoder)
    if max(ids) >= table.num_embeddings:
        encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = _table(encoder).requires_grad_(False)
    table.weight[ids] = rows.to(table.weight)
    for module in encoder.modules():  # old configurations find the caption's end as the largest number, no longer true
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id


class NewWord(nn.Module):
    """A word whose embeddings are learnt; the text encoders read them as they are now.

    Attributes:
        rows: The embeddings [N, width] of each text encoder, float32.
    """

    def __init__(self, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], word: str, count: int) -> None:
        """The word with so many tokens, each beginning as a piece of what the base reads in it.

        Raises:
            AdapterError: The base knows the word already.
        """
        super().__init__()
        self.word, self.count = word, count
        rows = {}
        for part, tokenizer in tokenizers.items():
            _check_new(word, count, tokenizer)
            pieces = tokenizer(word, add_special_tokens=False).input_ids
            weight = _table(parts[part]).weight.detach()
            rows[part] = weight[[pieces[number % len(pieces)] for number in range(count)]].float()
        self.rows = nn.ParameterDict({part: nn.Parameter(values) for part, values in rows.items()})
        teach(parts, tokenizers, [Adapter({}, self.extras())])
        self._hooks = []
        for part, tokenizer in tokenizers.items():
            first = tokenizer.convert_tokens_to_ids(word)
            self._hooks.append(_table(parts[part]).register_forward_hook(partial(self._read, part, first)))

    def _read(self, part: str, first: int, table: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The table's answer [B, T, width], with what is learnt in the places of the word's tokens."""
        place = args[0] - first
        mine = (place >= 0) & (place < self.count)
        learnt = self.rows[part][place.clamp(0, self.count - 1)]
        return torch.where(mine[..., None], learnt.to(output.dtype), output)

    def spell(self, caption: str) -> str:
        """The caption with the word's every token in its place."""
        return caption.replace(self.word, " ".join(spelt(self.word, self.count)))

    def extras(self) -> dict[str, Tensor]:
        """The embeddings as an adapter holds them."""
        return {f"embedding.{self.word}.{part}": rows.detach().clone().cpu() for part, rows in self.rows.items()}

    def detach(self) -> None:
        """Let the encoders read their own tables again."""
        for hook in self._hooks:
            hook.remove()
