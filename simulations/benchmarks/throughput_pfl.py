"""The clients of throughput.py under pfl-research's simulator; runs in an environment that has the package `pfl`.

Reads what it is to do as JSON, prints CPU seconds per client of each round as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class Learner(nn.Module):
    """The model with the loss that pfl asks for: each text's mean over its learnt tokens, then the mean of texts."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.adapted = adapted

    def loss(self, tokens: Tensor, present: Tensor, learnt: Tensor) -> Tensor:
        """The loss of a batch."""
        width = int(present.sum(1).max())
        tokens, present, learnt = tokens[:, :width], present[:, :width], learnt[:, 1:width]
        logits = self.adapted(input_ids=tokens, attention_mask=present).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(learnt)
        return ((each * learnt).sum(1) / learnt.sum(1)).mean()

    def metrics(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: pfl evaluates in the first round, which is not counted."""
        return {"none": Weighted(0.0, 1)}


class Clock(TrainingProcessCallback):
    """CPU time of each round."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.last = time.process_time()

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
        """Notes it."""
        now = time.process_time()
        self.taken.append(now - self.last)
        self.last = now
        return False, Metrics()


def main(asked: dict[str, Any]) -> list[float]:
    """CPU seconds per client, by round."""
    torch.set_num_threads(1)
    folder = Path(asked["folder"])
    with np.load(folder / "texts.npz") as stored:
        tokens, present, starts = (torch.from_numpy(stored[name]) for name in ("tokens", "present", "starts"))
    learnt = present * (torch.arange(tokens.shape[1]) >= starts.unsqueeze(1))
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(asked["model"]), config)
    with np.load(folder / "start.npz") as stored:
        set_peft_model_state_dict(adapted, {name: torch.from_numpy(stored[name]) for name in stored.files})
    weights = [w for w in adapted.parameters() if w.requires_grad]
    model = PyTorchModel(
        Learner(adapted),
        lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(0.9, 0.99)),
        torch.optim.SGD(weights, lr=1.0),
    )
    per_client = len(tokens) // asked["clients"]
    users = {}
    for client in range(asked["clients"]):
        rows = torch.arange(asked["steps"] * asked["batch"]) % per_client + client * per_client
        users[client] = [tokens[rows], present[rows], learnt[rows].float()]
    sampler = get_user_sampler("minimize_reuse", list(users))
    data = FederatedDataset(lambda client: Dataset(raw_data=users[client], user_id=client), sampler)
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=asked["rounds"],
            evaluation_frequency=10**6,
            train_cohort_size=asked["clients"],
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=data, val_data=None),
        model,
        NNTrainHyperParams(local_batch_size=asked["batch"], local_num_epochs=1, local_learning_rate=asked["rate"]),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )
    return [taken / asked["clients"] for taken in clock.taken]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
