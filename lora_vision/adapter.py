"""Adapter: the plain value between files above and models below."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_vision.errors import AdapterError
from lora_vision.factors import Factors


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter changes, knowing neither file nor model.

    Attributes:
        layers: True layer name (``<part>.<checkpoint module path>``) to the change of that layer.
        extras: Tensors that change no layer: a classifier head (``vit.classifier.weight``), learnt embeddings.
        metadata: Free text from the file's header, strings to strings.
    """

    layers: Mapping[str, Factors]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a model it reaches, sorted: ``unet``, ``text_encoder``, ``text_encoder_2``, ``vit``."""
        return tuple(sorted({name.partition(".")[0] for name in self.layers}))

    @property
    def nbytes(self) -> int:
        """Bytes its tensors take in memory."""
        layers = sum(t.nbytes for factors in self.layers.values() for t in factors.tensors().values())
        return layers + sum(t.nbytes for t in self.extras.values())

    def check_layers(self) -> None:
        """Nothing, if it changes layers.

        Raises:
            AdapterError: It does not.
        """
        if not self.layers:
            held = ", ".join(self.extras) or "nothing"
            advice = "; words.teach adds embeddings to a text encoder" if "embedding." in held else ""
            raise AdapterError(f"this adapter changes no layer, it holds {held}{advice}")
