"""The training loop: steps, moving average, evaluations, checkpoints, and stopping when told to. On any number of
processes, and from any checkpoint to the same weights.
"""

import json
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import BertForSequenceClassification, get_linear_schedule_with_warmup

from model.training.batches import batches, collate
from model.training.checkpoint import Checkpoints, random_state, set_random_state
from model.training.corpus import Example, evaluation_sets, training_set, vary
from model.training.distributed import Processes
from model.training.recipe import Recipe
from model.training.record import Run
from model.training.tracking import Tracker

# EX_TEMPFAIL of sysexits.h: neither done nor failed; the same command goes on from the checkpoint.
INCOMPLETE_EXIT_CODE = 75
# [MASK] in the backbone's vocabulary; the special tokens all come before it, words after.
MASK_ID = 103
EVALUATION_TOKENS = 4096
# Apart from those of seeds and epochs.
RANK_STRIDE = 1_000_003


class Average:
    """Exponential moving average of the weights: what is saved generalises better than the last step."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                self.weights[name].lerp_(value, 1 - self.decay)


@dataclass
class Best:
    """The average that got most of the development sets right so far: its weights, and each set's accuracy."""

    hits: int = 0
    epoch: float = 0.0
    accuracy: dict[str, float] | None = None
    weights: dict[str, torch.Tensor] | None = None


@dataclass
class Fit:
    """One run of `model`; `shadow` is another of its kind, in which averages are scored.

    data: folder with the corpus. checkpoint_minutes: the most that a killed run loses, beside one step or evaluation.
    """

    model: BertForSequenceClassification
    shadow: BertForSequenceClassification
    tokenizer: Tokenizer
    data: Path
    recipe: Recipe
    run: Run
    processes: Processes
    checkpoints: Checkpoints
    checkpoint_minutes: float

    def __post_init__(self) -> None:
        self.model.to(self.processes.device).train()
        self.shadow.to(self.processes.device).eval()
        self.examples = training_set(self.data, self.recipe.rated_repeats)
        self.evaluations = evaluation_sets(self.data)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, self.recipe), lr=self.recipe.learning_rate)
        self.steps_per_epoch = len(self.mine(self.examples, random.Random(0)))
        total = self.steps_per_epoch * self.recipe.epochs
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, int(0.06 * total), total)
        self.average = Average(self.model, self.recipe.average_decay)
        self.best = Best()
        # The epoch, the steps of it that are done, and the steps of all.
        self.epoch = self.position = self.step = 0
        self.shared = self.processes.shared(self.model)

    def mine(self, examples: list[Example], rng: random.Random) -> list[Any]:
        """This process's batches of an epoch, as many as every other has."""
        groups = batches(examples, self.tokenizer, self.recipe.batch_tokens, rng)
        each = len(groups) // self.processes.size
        return groups[self.processes.rank :: self.processes.size][:each]

    def finish(self) -> tuple[Best, Tracker]:
        """Trains to the end, from the latest checkpoint if there is one.

        Raises SystemExit with INCOMPLETE_EXIT_CODE after a checkpoint if SIGTERM or SIGINT asks any process to stop.
        """
        state = self.processes.from_main(self.checkpoints.latest)
        if state:
            self.restore(state)
        tracker = Tracker(self.run, state["tracking"] if state else None, active=self.processes.main)
        saved = time.monotonic()
        with stop_asked() as asked:
            while self.epoch < self.recipe.epochs:
                for group in self.rest_of_epoch(resumed=state is not None):
                    self.train(group)
                    if self.position % max(1, self.steps_per_epoch // self.recipe.evaluations) == 0:
                        self.evaluate(tracker)
                    due = time.monotonic() - saved >= self.checkpoint_minutes * 60
                    # Agreed on, so that none waits for one that has gone to write.
                    stop, save = self.processes.any(bool(asked), due)
                    if stop or save:
                        self.save(tracker.run_id)
                        saved = time.monotonic()
                    if stop:
                        tracker.end(finished=False)
                        if self.processes.main:
                            print(f"stopped after step {self.step}; the same command goes on from there", flush=True)
                        raise SystemExit(INCOMPLETE_EXIT_CODE)
                state = None
                self.epoch, self.position = self.epoch + 1, 0
            if self.best.weights is None:
                self.evaluate(tracker)
        return self.best, tracker

    def rest_of_epoch(self, *, resumed: bool) -> Iterator[Any]:
        """The epoch's batches that are not done. Seeded by epoch, so that a resumed run sees what an unbroken one
        would have seen."""
        seed = self.recipe.seed * 1000 + self.epoch
        rng = random.Random(seed)
        if not resumed:
            torch.manual_seed(seed + RANK_STRIDE * self.processes.rank)
        groups = self.mine([vary(example, rng) for example in self.examples], rng)
        # Variation may change the number of batches; the schedule was laid out for this many.
        groups = groups[self.position : self.steps_per_epoch]
        return iter(tqdm(groups, f"epoch {self.epoch + 1}", mininterval=5, disable=not self.processes.main))

    def train(self, group: Any) -> None:
        """One step."""
        ids, mask, target = collate(group)
        hidden = (torch.rand(ids.shape) < self.recipe.hidden_tokens) & (ids > MASK_ID)
        ids = ids.masked_fill(hidden, MASK_ID)
        device = self.processes.device
        ids, mask, target = ids.to(device), mask.to(device), target.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = self.shared(input_ids=ids, attention_mask=mask).logits.float()
        soft = torch.stack([1 - target, target], dim=1)
        loss = torch.nn.functional.cross_entropy(logits, soft, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)
        self.position += 1
        self.step += 1

    @torch.no_grad()
    def evaluate(self, tracker: Tracker) -> None:
        """Scores the average, and keeps it if it is the best so far."""
        self.shadow.load_state_dict(self.average.weights)
        hits = self.processes.total(*(self.count_hits(rows) for rows in self.evaluations.values()))
        sizes = {name: len(rows) for name, rows in self.evaluations.items()}
        accuracy = {name: round(count / sizes[name], 4) for name, count in zip(sizes, hits, strict=True)}
        at = round(self.epoch + self.position / self.steps_per_epoch, 2)
        if self.processes.main:
            print(json.dumps({"epoch": at, "accuracy": accuracy}), flush=True)
        tracker.metrics(self.step, {f"accuracy_{name}": value for name, value in accuracy.items()})
        if self.best.weights is None or sum(hits) > self.best.hits:
            weights = {name: value.clone() for name, value in self.average.weights.items()}
            self.best = Best(sum(hits), at, accuracy, weights)

    def count_hits(self, rows: list[tuple[int, str]]) -> int:
        """Of this process's share of the rows, those whose likelier label is the true one."""
        share = [Example(text, label) for label, text in rows[self.processes.rank :: self.processes.size]]
        hits = 0
        for group in batches(share, self.tokenizer, EVALUATION_TOKENS, random.Random(0)) if share else ():
            ids, mask, target = (each.to(self.processes.device) for each in collate(group))
            logits = self.shadow(input_ids=ids, attention_mask=mask).logits
            hits += int(((logits[:, 1] > logits[:, 0]).float() == target).sum())
        return hits

    def save(self, tracking: str | None) -> None:
        """A checkpoint of all that the rest of the run depends on, written by the main process while all wait."""
        generators = self.processes.gathered(random_state())
        if self.processes.main:
            state = {
                "epoch": self.epoch,
                "position": self.position,
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.weights,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "best": vars(self.best),
                "generators": generators,
                "tracking": tracking,
            }
            self.checkpoints.save(self.step, state)
        self.processes.wait()

    def restore(self, state: dict[str, Any]) -> None:
        """What `save` wrote."""
        device = self.processes.device
        self.epoch, self.position, self.step = state["epoch"], state["position"], state["step"]
        self.model.load_state_dict(state["model"])
        self.average.weights = {name: value.to(device) for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.best = Best(**state["best"])
        set_random_state(state["generators"][self.processes.rank])


def parameter_groups(model: BertForSequenceClassification, recipe: Recipe) -> list[dict[str, object]]:
    """Slower steps towards the input, whose layers know most already; no decay of biases and norms."""
    layers = model.config.num_hidden_layers
    groups = []
    for name, parameter in model.named_parameters():
        if "embeddings" in name:
            depth = layers + 1
        elif match := re.search(r"layer\.(\d+)\.", name):
            depth = layers - int(match[1])
        else:
            depth = 0
        decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else 0.01
        rate = recipe.learning_rate * recipe.layer_decay**depth
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return groups


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """A list with an entry once SIGTERM or SIGINT has come: the step that runs is finished first."""
    asked: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: asked.append(number)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
