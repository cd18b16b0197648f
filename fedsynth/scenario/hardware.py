"""Precision, devices and quantization of the server's models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""Precision of a frozen base; trained weights, norms, sums and noise are float32 in any case."""

DeviceMap: TypeAlias = Literal["none", "auto", "balanced", "sequential"]
"""`none`: one device, the first GPU if there is one. Else the GPUs share each model, as accelerate's names say."""

Quantization: TypeAlias = Literal["none", "8bit", "4bit"]
"""Weights in fewer bits (bitsandbytes), on a GPU."""


@dataclass(frozen=True)
class Hardware:
    """How a model of the server is loaded. Its text is public or released, so that no guarantee depends on it.

    Attributes:
        precision: `auto` is bfloat16 on a GPU that computes in it, and on CPUs where it pays.
        device_map: How several GPUs share the model.
        quantization: Bits of its weights.
    """

    precision: Precision = "auto"
    device_map: DeviceMap = "none"
    quantization: Quantization = "none"
