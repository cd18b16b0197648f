"""How a model of the server is loaded: its precision, its device, several GPUs, 8 and 4 bits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fedsynth.models.devices import device, gpus
from fedsynth.models.hub import elsewhere
from fedsynth.models.loading import Role, dtype_of, load_model
from fedsynth.scenario.hardware import Hardware
from fedsynth.scenario.server import Server
from fedsynth.typed import BadValue

ONE_DEVICE = Hardware()


def check_hardware(hardware: Hardware) -> None:
    """Checks that this machine can load models so.

    Raises:
        BadValue: If a package or a GPU is missing, with the way out.
    """
    asked = {
        f'server.device_map = "{hardware.device_map}"': hardware.device_map != "none",
        f'server.quantization = "{hardware.quantization}"': hardware.quantization != "none",
    }
    for key in (key for key, said in asked.items() if said):
        if not gpus():
            raise BadValue(f"{key} needs a CUDA GPU, and there is none here: leave the key out")
        if find_spec("accelerate") is None:
            raise BadValue(f"{key} needs the package accelerate: pip install accelerate, or leave the key out")
    if hardware.quantization != "none" and find_spec("bitsandbytes") is None:
        raise BadValue(
            f'server.quantization = "{hardware.quantization}" needs the package bitsandbytes: '
            'pip install "fedsynth[quantized]", or leave the key out'
        )


def server_dtype(name: str, hardware: Hardware = ONE_DEVICE) -> Any:
    """The torch type that a model of the server computes in.

    `auto` is bfloat16 on a GPU that has it. Clients' generators differ (`loading.dtype_of`): there a guarantee depends
    on it.
    """
    if hardware.precision == "auto" and gpus():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return dtype_of(name, hardware.precision)


def embedder_dtype(hardware: Hardware = ONE_DEVICE) -> Any:
    """The torch type of the server's embedder: float32 on a CPU unless the scenario says bfloat16."""
    if hardware.precision == "auto" and not gpus():
        return torch.float32
    return server_dtype("", hardware)


def load_placed(name: str, role: Role, dtype: Any, hardware: Hardware = ONE_DEVICE) -> Any:
    """A model in evaluation mode on its device.

    Raises:
        BadValue: If this machine cannot load it so; see also `load_model`.
    """
    check_hardware(hardware)
    more = placement(dtype, hardware)
    model = load_model(name, role, dtype=dtype, **more)
    # A model that accelerate has placed cannot be moved.
    return model if more else model.to(device())


def placement(dtype: Any, hardware: Hardware) -> dict[str, Any]:
    """The arguments of `from_pretrained` for several GPUs and for fewer bits; none for one device."""
    more: dict[str, Any] = {}
    if hardware.quantization == "8bit":
        more["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if hardware.quantization == "4bit":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if hardware.device_map != "none":
        more["device_map"] = hardware.device_map
    elif more:
        more["device_map"] = {"": 0}
    return more


def choices(server: Server) -> dict[str, str]:
    """How each model of the server will be loaded on this machine, by role and name; endpoints aside."""
    hardware, found = server.hardware, {}
    for role, name in (("llm", server.llm), ("professional", server.professional)):
        if isinstance(name, str) and not elsewhere(name):
            where = str(device()) if hardware.device_map == "none" else f"GPUs, {hardware.device_map}"
            bits = "" if hardware.quantization == "none" else f", {hardware.quantization}"
            found[f"{role} {name}"] = f"{_named(server_dtype(name, hardware))} on {where}{bits}"
    if server.embedder is not None and not elsewhere(server.embedder):
        found[f"embedder {server.embedder}"] = f"{_named(embedder_dtype(hardware))} on {device()}"
    return found


def _named(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
