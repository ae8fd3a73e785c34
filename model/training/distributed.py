"""One process or several, as torchrun's environment says (RANK, WORLD_SIZE, MASTER_ADDR, …), and what they agree on.

Knows nothing of what is trained.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# For the slowest step between two that all take: an evaluation, a checkpoint's way to a slow volume.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Processes:
    """What all of them call, all must call in the same order."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def total(self, *numbers: int) -> list[int]:
        """Each number, summed over all processes."""
        if self.size == 1:
            return list(numbers)
        # On the CPU, where gloo sums it: a GPU would have to finish its queue first.
        summed = torch.tensor(numbers)
        dist.all_reduce(summed)
        return [int(number) for number in summed]

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set anywhere."""
        return [count > 0 for count in self.total(*map(int, flags))]

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What the first process makes: only it needs the volume that it reads."""
        found = [make() if self.main else None]
        if self.size > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def shared(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, whose gradients are averaged over all processes."""
        return DistributedDataParallel(model) if self.size > 1 else model


@contextmanager
def join() -> Iterator[Processes]:
    """This process among those that train: on a GPU of its own where there is one."""
    # What CUDA takes for sums that are the same on every run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
