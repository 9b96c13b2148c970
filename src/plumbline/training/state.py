"""The state of networks, optimizers and random generators, as checkpoints hold it."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from plumbline.training.checkpoint import State


def weights_state(networks: Mapping[str, nn.Module], optimizer: Optimizer) -> State:
    """What is trained, and the optimizer's running averages; frozen weights come from elsewhere."""
    averages = optimizer.state_dict()["state"]
    return {
        "networks": {name: _trained(network) for name, network in networks.items()},
        "optimizer": {str(index): dict(values) for index, values in averages.items()},
    }


def load_networks(networks: Mapping[str, nn.Module], state: State) -> None:
    """Put saved weights into networks of the same shape."""
    with torch.no_grad():
        for name, network in networks.items():
            trained, saved = _trained(network), state["networks"][name]
            if trained.keys() != saved.keys():
                raise ValueError(
                    f"checkpoint: expected the trained weights of {name} to be "
                    f"{sorted(trained)[:3]} …, got {sorted(saved)[:3]} …"
                )
            for weight, parameter in trained.items():
                parameter.copy_(saved[weight])


def load_optimizer(optimizer: Optimizer, state: State) -> None:
    """Put saved running averages into an optimizer of the same weights."""
    averages = {int(index): values for index, values in state["optimizer"].items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": averages, "param_groups": groups})


def schedule_state(optimizer: Optimizer, schedule: LRScheduler) -> State:
    """Where the learning rate stands."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return {"schedule": schedule.state_dict(), "rates": rates}


def load_schedule(optimizer: Optimizer, schedule: LRScheduler, state: State) -> None:
    """Put the learning rate where it stood."""
    schedule.load_state_dict(state["schedule"])
    for group, rate in zip(optimizer.param_groups, state["rates"], strict=True):
        group["lr"] = rate


def random_state() -> State:
    """The states of the process's own generators: Python's, NumPy's, torch's on CPU and GPUs."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, numbers, gauss],
        "numpy": [name, torch.tensor(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_random(state: State) -> None:
    """Set the process's own generators; those of GPUs as far as there are as many."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def on_device(value: Any, device: torch.device) -> Any:
    """The same state with its tensors on a device."""
    match value:
        case torch.Tensor():
            return value.to(device)
        case dict():
            return {name: on_device(part, device) for name, part in value.items()}
        case list():
            return [on_device(part, device) for part in value]
    return value


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
