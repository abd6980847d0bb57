"""transformers' Trainer on an experiment: batches of one task, adapters saved, answers scored."""

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.experiment.batches import IGNORED, Batches
from fused_route.training.experiment.build import Built
from fused_route.training.experiment.decoding import Asking, Questions, answers, token_losses
from fused_route.training.experiment.folder import (
    COMPLETE,
    LAST,
    LOSSES,
    keep_checkpoints,
    save,
    write_json,
)
from fused_route.training.experiment.sampling import TaskBatches, in_order
from fused_route.training.experiment.sharded import gathered
from fused_route.training.experiment.tasks import TASKS, Rows, Scored

UNDECAYED = ("b_A", "b_B", "norm_weight")  # of adapters, not known to transformers by name
# What torch says when it cannot write a file's end or middle: its own kind of error is no OSError.
WRITER = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos|file write failed")


def one_line(error: BaseException) -> str:
    """An error's message without its line ends, and without the stack that torch's bring along."""
    return " ".join(str(error).split("\nException raised from")[0].split())


class ExperimentTrainer(Trainer):
    """Trains what `Built.tuned` holds.

    Args:
        built: the model and what belongs to it.
        arguments: transformers' own.
        train: rows to train on.
        validation: rows to select by: of the role "evaluate" for scores, "train" for the loss.
        callbacks: transformers' own.
    """

    def __init__(
        self,
        built: Built,
        arguments: TrainingArguments,
        train: Rows | None = None,
        validation: Rows | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.built = built
        self.rows = train
        # Of this process: the sum of its steps' losses, and how many steps have one not finite.
        self.losses = torch.zeros(2, device=arguments.device)
        self.before = (0.0, 0.0)  # of a checkpoint that is gone on from, see `losses_before`
        self.undecayed: tuple[str, ...] = UNDECAYED
        self.asking: Batches = built.batches()
        augmented = built.batches(augmentation=built.recipe.augmentation)
        super().__init__(
            built.model,
            arguments,
            data_collator=augmented.training,
            train_dataset=train,
            eval_dataset=validation,
            callbacks=[*(callbacks or []), _BestIsHere(), _Diverged()],
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one task each: see `TaskBatches`."""
        assert self.rows is not None
        names = list(self.rows.samples)
        default = self.args.per_device_train_batch_size
        sizes = {n: self.built.recipe.tasks[n].batch_size or default for n in names}
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = {name: self.rows.of(name) for name in names}
        sampler = TaskBatches(rows, sizes, self.built.recipe.sampling, seed)
        self.add_callback(_EpochOf(sampler))
        loader = self._loader(self.rows, sampler, self.data_collator)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _loader(self, rows: Rows, batches: Any, collate: Any) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """transformers' own, without what it does not know as biases and norms by its name."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name.rpartition(".")[2] not in self.undecayed]

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """transformers' own, with the modules of the batch's task."""
        self.built.tuned.use(inputs.pop("name"))
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        here, is_finite = loss.detach(), loss.detach().isfinite()
        part = 1 / self.current_gradient_accumulation_steps  # of a step
        lost = torch.where(is_finite, 0.0, part)  # fp16 steps over one: its scale was too large
        self.losses += torch.stack([torch.where(is_finite, here, 0.0), lost])
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """transformers' own, without the number of tokens where tasks are mixed.

        Then every batch of a step counts as much, by its own mean: with tokens counted together, a
        batch of captions would count as many times one of answers as it has tokens, and one whose
        answers have weights, which is a mean over rows, would come on top of that.
        """
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        return batches, tokens if len(self.built.recipe.tasks) == 1 else None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, but no step behind the last, after which alone it looks for an end:
        a run may have been killed there, before its scores were written."""
        patience = [c for c in self.callback_handler.callbacks if type(c) is EarlyStoppingCallback]
        if self.state.global_step >= self.state.max_steps or any(
            c.early_stopping_patience_counter >= c.early_stopping_patience for c in patience
        ):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def summed(self) -> tuple[float, float]:
        """(sum of losses, mean over processes, number of steps), of all steps that have one."""
        total, lacking = self.before
        here = self.accelerator.gather(self.losses).view(-1, 2).mean(0).tolist()
        return total + here[0], self.state.global_step - lacking - here[1]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own; with weights, Σ_i weight_i · (mean of row i's token losses) / B."""
        if "weights" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, _ = row_losses(model, inputs, self.built.recipe.model.kind)
        loss = losses.mean()
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            loss = loss / self.current_gradient_accumulation_steps  # which the Trainer left to it
        return (loss, {}) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """What the recipe selects by: scores of answers, or the loss, on the validation rows.

        "eval_score" is the mean over tasks of their main scores, "eval_loss" the loss.
        """
        start = time.time()
        rows: Rows = eval_dataset or self.eval_dataset
        if self.built.recipe.select == "loss":
            found = {"loss": self.loss_on(rows)}
        else:
            _, found = self.scored(rows)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.time() - start, 3)
        self.log(metrics)
        told = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: TrainerControl = told
        return metrics

    def scored(self, rows: Rows) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
        """(answers by task and id, scores as of `named`)."""
        given = self.answered(rows)
        return given, named(self.judged(rows, given))

    def judged(self, rows: Rows, given: Mapping[str, Mapping[str, str]]) -> dict[str, Scored]:
        """The scores of answers (by task and id) to rows, by task."""
        found = {}
        for name, samples in rows.samples.items():
            recipe = self.built.recipe.tasks[name]
            found[name] = TASKS[LAYOUTS[recipe.layout].task].score(given[name], samples, recipe)
        return found

    def answered(self, rows: Rows) -> dict[str, dict[str, str]]:
        """An answer to each row, by task and id; the processes share the work."""
        model, device = self.built.model.eval(), self.args.device
        found: list[tuple[str, str, str]] = []
        generation = {"synced_gpus": True} if self.is_fsdp_enabled else {}
        for _, questions in self._shared(rows, Asking(self.asking), "answering"):
            self.built.tuned.use(questions.name)
            inputs = [
                {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
                for batch in questions.inputs
            ]
            moved = Questions(questions.name, questions.ids, inputs)
            with self.accelerator.autocast():
                given = answers(model, self.asking, moved, **generation)
            found += zip(repeat(questions.name), questions.ids, given, strict=False)
        by_task: dict[str, dict[str, str]] = {name: {} for name in rows.samples}
        for name, key, answer in gather_object(found):
            by_task[name][key] = answer
        return by_task

    @torch.no_grad()
    def loss_on(self, rows: Rows) -> float:
        """The loss on rows of the role "train", whatever the batches: mean over tokens, over rows
        where answers have weights or are classes, and over the tasks."""
        model = self.built.model.eval()
        found: list[tuple[int, str, float, int]] = []
        for number, inputs in self._shared(rows, self.asking.training, "validating"):
            inputs = self._prepare_inputs(inputs)
            name = inputs.pop("name")
            self.built.tuned.use(name)
            with self.compute_loss_context_manager():
                losses, counts = row_losses(model, inputs, self.built.recipe.model.kind)
            found.append((number, name, float(losses.sum()), int(counts.sum())))
        every = {number: rest for number, *rest in gather_object(found)}.values()
        means = [
            sum(loss for of, loss, _ in every if of == name)
            / sum(count for of, _, count in every if of == name)
            for name in rows.samples
        ]
        return sum(means) / len(means)

    def _shared(self, rows: Rows, collate: Any, doing: str) -> Iterator[tuple[int, Any]]:
        """(number, batch) for this process, as many as for any other: the first come again."""
        batches = in_order({n: rows.of(n) for n in rows.samples}, self.args.eval_batch_size)
        rank, world = self.args.process_index, self.args.world_size
        even = list(islice(cycle(batches), -(-len(batches) // world) * world))
        loader = self._loader(rows, even[rank::world], collate)
        silent = rank != 0 or self.args.disable_tqdm
        numbers = islice(cycle(range(len(batches))), rank, None, world)
        bar = tqdm(loader, desc=doing, unit="batch", leave=False, disable=silent)
        return zip(numbers, bar, strict=False)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, whole where it is sharded."""
        with gathered(self.model):
            self._save(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained, and nothing of the frozen models."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            with _told_where(folder):
                save(self.built, folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' own, older checkpoints taken away when this one is complete, not before."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir)
        here, losses = folder / f"checkpoint-{self.state.global_step}", self.summed()
        try:
            with _told_where(here):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each writes its random state
                if self.args.should_save:
                    write_json(here / LOSSES, losses)
                    (here / COMPLETE).touch()
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep_checkpoints(folder, limit, None if best is None else Path(best).name)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """transformers' own, among steps that are saved: what is gone cannot be the best."""
        saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        return bool(saved and super()._determine_best_metric(metrics, trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with gathered(self.model):
            self.built.tuned.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Keeps the last before it."""
        self.save_model(str(Path(self.args.output_dir) / LAST))
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


@contextmanager
def _told_where(folder: Path) -> Iterator[None]:
    """ValueError where a folder cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not WRITER.search(str(error)):
            raise
        raise ValueError(
            f"{folder} could not be written, the disk may be full ({one_line(error)}): make room, "
            "then the same command goes on from the checkpoint before"
        ) from None


def named(judged: Mapping[str, Scored]) -> dict[str, float]:
    """ "<task>_<score>" of every task, and "score", the mean of their main scores."""
    scores = {f"{name}_{key}": x for name, of in judged.items() for key, x in of.scores.items()}
    return {**scores, "score": sum(of.main for of in judged.values()) / len(judged)}


def refuse_not_finite(model: Any) -> None:
    """ValueError where what is trained is not finite, which no further step mends."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise ValueError(
                f"training diverged: {name} is not finite; lower training.learning_rate, or set "
                "adapter.normalize to unit"
            )


class _BestIsHere(TrainerCallback):
    """Finds the best checkpoint of a resumed run in the run's folder, which may have been moved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Its step is known; its path is that of another time."""
        if state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None


class _Diverged(TrainerCallback):
    """Stops a run whose gradients are not finite, when it says so."""

    def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """At every line of numbers."""
        if not math.isfinite(told.get("logs", {}).get("grad_norm", 0.0)):
            refuse_not_finite(told["model"])


class _EpochOf(TrainerCallback):
    """Tells the sampler its epoch, which accelerate's shards and skips do not pass on."""

    def __init__(self, sampler: TaskBatches) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Whole epochs; a resumed one begins with a fraction."""
        self.sampler.set_epoch(math.floor((state.epoch or 0.0) + 1e-6))


def row_losses(model: Any, inputs: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
    """(losses, counts) of rows, (B,) each; their sums' quotient is the loss of all of them.

    Of a classifier the mean over its answers; of texts the sum over tokens and their number; with
    weights the weighted mean of a row's tokens.
    """
    weights = inputs.pop("weights", None)
    logits, labels = model(**inputs).logits.float(), inputs["labels"]
    ones = torch.ones(len(labels), device=labels.device)
    if kind == "classifier":
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return losses.mean(1), ones
    if kind == "decoder":  # its labels are those of the place before
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses, counts = token_losses(logits, labels).sum(1), labels.ne(IGNORED).sum(1)
    if weights is None:
        return losses, counts
    return weights * losses / counts.clamp(min=1), ones
