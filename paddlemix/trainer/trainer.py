"""LlavaTrainer: PaddleNLP's Trainer with a loss over the whole global batch, checkpoints that are whole or absent, and
evaluation by loss and by written answers.
"""

import contextlib
import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed.fleet.utils import mix_precision_utils
from paddlenlp.peft import LoRAModel
from paddlenlp.trainer import Trainer, TrainerState
from paddlenlp.trainer.trainer_callback import PrinterCallback
from paddlenlp.trainer.trainer_callback import ProgressCallback as PaddleProgressCallback
from paddlenlp.trainer.trainer_utils import IntervalStrategy, ShardingOption, TrainOutput, speed_metrics

from paddlemix.datasets.collator import LlavaCollator
from paddlemix.datasets.parallel import BatchLoader
from paddlemix.datasets.samplers import GlobalBatchSampler, ModalityLengthSampler
from paddlemix.errors import UserError
from paddlemix.models.llava.linear import bfloat16_products
from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.batches import COUNT_KEY, GlobalBatchLoader, UnreadableBatch, WithoutLabels
from paddlemix.trainer.callbacks import (
    BeginCallback,
    LogFileCallback,
    MetricsFileCallback,
    ProgressCallback,
    StopCallback,
)
from paddlemix.trainer.evaluation import evaluate_answers, evaluate_loss
from paddlemix.trainer.freezing import named_model_parameters, part_of
from paddlemix.trainer.noise import EmbeddingNoise
from paddlemix.trainer.optimizer_state import load_optimizer, save_optimizer
from paddlemix.trainer.run_folder import (
    PARTIAL,
    publish,
    remove_old_checkpoints,
    remove_tree,
    seal,
    write_aside,
    write_json,
)
from paddlemix.trainer.shared_gradients import average_gradients, complete_gradients, whole_graph
from paddlemix.trainer.weights import load_trained_weights, save_trained_weights

__all__ = ["LlavaTrainer"]

logger = logging.getLogger(__name__)

STATE_FILE, PROGRESS_FILE = "trainer_state.json", "progress.json"


class _Stop(Exception):
    """Evaluation was left because the run is to stop."""


class LlavaTrainer(Trainer):
    """Trains a LlavaLlamaForCausalLM, alone or inside a LoRAModel.

    What differs from PaddleNLP's Trainer:

    - The loss of an optimizer step is the sum over the supervised tokens of its global batch (all micro-batches, all
      ranks) divided by their number, so it doesn't depend on how the batch is split. Logged losses and ``eval_loss``
      are that same figure.
    - Each optimizer step draws its random numbers (dropout, noise) from a seed of its own, made from ``seed``, the step
      and the rank; together with the samplers' seeds per epoch a resumed run repeats an uninterrupted one.
    - Learning rates per part of the model, and one gradient norm over all of them.
    - A checkpoint appears under its name when it is whole, and is itself a model folder that the chat opens.

    Args:
        model: all parameters already frozen or not (``freezing.select_trained``).
        args: FinetuneArguments.
        train_dataset, eval_dataset: samples as ``LlavaCollator`` takes them; with ``group_by_modality_length`` the
            first has ``lengths``, with ``eval_with_do_generation`` the second is a SupervisedDataset.
        processor: saved beside the weights; makes the prompts of evaluation.
        begin: called once when training begins: after the checkpoint to go on from is loaded, before anything is written.
        callbacks: further ones.
    """

    def __init__(
        self,
        model: nn.Layer,
        args: FinetuneArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processor: Any = None,
        data_collator: Optional[Callable] = None,
        begin: Callable[[], None] = lambda: None,
        callbacks: Sequence[Any] = (),
    ):
        self.processor = processor
        if processor is not None and not args.pad_token_id:
            args.pad_token_id = processor.pad_token_id  # what count_trained_tokens leaves out
        if data_collator is None:
            data_collator = LlavaCollator(processor.pad_token_id if processor is not None else 0)
        metrics_path, args.metrics_output_path = args.metrics_output_path, None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[BeginCallback(begin), LogFileCallback()],
        )
        args.metrics_output_path = metrics_path
        # PaddleNLP's timers are the process's, so another trainer may have switched them on, or left one running
        if args.skip_profile_timer:
            self.timers = None
        for timer in self.timers.timers.values() if self.timers is not None else ():
            timer.reset()
        if metrics_path is not None:
            self.add_callback(MetricsFileCallback(metrics_path, args.process_index))
        for bare in (PrinterCallback, PaddleProgressCallback):
            self.remove_callback(bare)
        self.add_callback(ProgressCallback(args.disable_tqdm))
        self.stopper = StopCallback()
        self.stopper.any_rank = self._any_rank
        self.add_callback(self.stopper)
        for callback in callbacks:
            self.add_callback(callback)
        inner = self._inner_model
        self.noise = EmbeddingNoise(inner.llama.embed_tokens, args.neftune_noise_alpha) if args.neftune else None
        self.trained_supervised_tokens = 0
        self.trained_samples = 0  # by this process, the samples of packed rows one by one
        self._tokens_at_log = 0
        self._tokens_seen = 0
        self._steps_begun = -1
        self._running_loss: Optional[paddle.Tensor] = None
        self._progress: Dict[str, Any] = {}
        self._resumed_from: Optional[Path] = None
        self._evaluated_at: Optional[int] = None
        self._last_metrics: Dict[str, float] = {}
        self._best_metrics: Optional[Dict[str, float]] = None
        self._loaded_best: Optional[int] = None  # its step

    # parts

    @property
    def _inner_model(self) -> nn.Layer:
        """The LlavaLlamaForCausalLM, without what is around it."""
        return self.model.model if isinstance(self.model, LoRAModel) else self.model

    @property
    def interrupted(self) -> bool:
        """Training was stopped by a signal, after a checkpoint."""
        return self.stopper.stopped

    @property
    def has_trained(self) -> bool:
        """A step was made since this trainer was built."""
        return self._running_loss is not None

    @property
    def last_evaluation(self) -> Optional[Dict[str, float]]:
        """What ``evaluate`` gave for the model as it is now; None if it hasn't been evaluated."""
        if self._loaded_best is not None:
            return self._best_metrics
        return self._last_metrics if self._evaluated_at == self.state.global_step else None

    @property
    def _ranks(self) -> int:
        return self.args.dataset_world_size

    def _sum_over_ranks(self, values: List[float]) -> List[float]:
        """Sums each number over all ranks, in float64."""
        if self.args.world_size <= 1:
            return values
        tensor = paddle.to_tensor(values, dtype="float64")
        dist.all_reduce(tensor)
        return tensor.tolist()

    def _any_rank(self, here: bool) -> bool:
        return bool(self._sum_over_ranks([float(here)])[0])

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    # data

    def get_train_dataloader(self) -> GlobalBatchLoader:
        args = self.args
        kind = ModalityLengthSampler if args.group_by_modality_length else GlobalBatchSampler
        sampler = kind(
            self.train_dataset,
            args.per_device_train_batch_size,
            num_replicas=self._ranks,
            rank=args.dataset_rank,
            accumulation_steps=args.gradient_accumulation_steps,
            seed=args.seed,
            drop_last=args.dataloader_drop_last,
        )
        return GlobalBatchLoader(
            self.train_dataset,
            sampler,
            self.data_collator,
            args.gradient_accumulation_steps,
            args.dataloader_num_workers,
            lambda count: round(self._sum_over_ranks([float(count)])[0]),
            self._stop_read_timer,
        )

    def _stop_read_timer(self) -> None:
        """PaddleNLP's loop starts this timer for each batch that it passes over, and fails if it runs already."""
        if self.timers is not None and self.timers("read-data").started_:
            self.timers("read-data").stop()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BatchLoader:
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise UserError("there is nothing to evaluate on; give dataset an eval entry, or set do_eval to false.")
        args = self.args
        sampler = GlobalBatchSampler(
            dataset, args.per_device_eval_batch_size, num_replicas=self._ranks, rank=args.dataset_rank, shuffle=False
        )
        return BatchLoader(
            WithoutLabels(dataset),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
        )

    # one step

    def training_step(self, model: nn.Layer, inputs: Dict[str, Any], step_control: int = 0) -> paddle.Tensor:
        """Forward and backward of one micro-batch.

        Returns:
            This rank's part of the global batch's loss: summed over the micro-batches and averaged over the ranks, the
            parts are the loss per supervised token.
        """
        if self.state.global_step != self._steps_begun:
            self._begin_step()
        total = inputs[COUNT_KEY]
        batch = self._prepare_inputs({key: value for key, value in inputs.items() if key != COUNT_KEY})
        model.train()
        noise = contextlib.nullcontext()
        if self.noise is not None:
            noise = self.noise.on(batch["attention_mask"], batch.get("segment_ids"))
        whole = whole_graph(self.model, batch) if self._ranks > 1 else contextlib.nullcontext()
        with bfloat16_products() if self.args.bfloat16_products else contextlib.nullcontext():
            with noise, whole, self.autocast_smart_context_manager():
                output = model(**batch, loss_reduction="sum")
                loss = output.loss * (self._ranks / total)
            (self.scaler.scale(loss) if self.do_grad_scaling else loss).backward()
        packed = batch.get("segment_ids")
        self.trained_samples += len(batch["input_ids"]) if packed is None else int(packed.max(axis=1).sum())
        if step_control + 1 == self.args.gradient_accumulation_steps:
            self._tokens_seen += total
            if ShardingOption.SHARD_GRAD_OP not in self.args.sharding:
                complete_gradients(self.model, self.args.amp_master_grad)
            # with amp_master_grad the loop averages
            if self._ranks > 1 and not self.args.use_hybrid_parallel and not self.args.amp_master_grad:
                average_gradients(self.model, self._ranks)
        loss = loss.detach()
        if output.label_logits is not None and not self.args.fp16:
            # Paddle's softmax on a CPU gives finite numbers for logits that are none, and hides a model that broke
            loss = loss + output.label_logits.detach().astype("float32").sum() * 0.0
        carried = self._progress.pop("loss_since_log", 0.0)  # of the steps between the last log and the checkpoint
        return loss + carried if carried else loss

    def _begin_step(self) -> None:
        """Before the first micro-batch of an optimizer step."""
        self._steps_begun = self.state.global_step
        if self._progress.pop("to_restore", False):
            self._total_loss_scalar = self._progress["total_loss"]
            self._globalstep_last_logged = self._progress["last_logged_step"]
            self._find_best()
            if self._progress["evaluation_pending"]:
                self._update_best(self.evaluate(), self._resumed_from)
        seeds = np.random.SeedSequence([self.args.seed, self.state.global_step, self.args.dataset_rank])
        seed = int(seeds.generate_state(1)[0])
        paddle.seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        value = float(loss)
        if not self.args.fp16 and not math.isfinite(value):
            raise UserError(
                f"the loss became {value} at step {self.state.global_step + 1}; lower learning_rate or max_grad_norm, or "
                "look at the data with check_dataset.py."
            )

    def _wrap_model(self, model: nn.Layer, training: bool = True) -> nn.Layer:
        """Plain data parallelism needs no wrapper here: the ranks begin alike, and gradients are summed by hand."""
        if not training or self.args.world_size <= 1 or self.args.use_hybrid_parallel:
            return super()._wrap_model(model, training)
        for parameter in model.parameters():
            dist.broadcast(parameter, src=0)
        if self.do_grad_scaling:
            model, self.optimizer = paddle.amp.decorate(
                models=model, optimizers=self.optimizer, level=self.args.fp16_opt_level, dtype=self.amp_dtype
            )
        if self.args.amp_master_grad:
            mix_precision_utils.MixPrecisionLayer(model, dtype=self.amp_dtype)
            self.optimizer = mix_precision_utils.MixPrecisionOptimizer(self.optimizer)
            model.no_sync = contextlib.nullcontext  # the training loop asks for it
        return model

    def create_optimizer(self, lr_scheduler: Any = None) -> paddle.optimizer.Optimizer:
        """Learning rates by part, no decay on biases and norms.

        No parameter groups: Paddle clips each group's gradients by a norm of its own.
        """
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        rates = {"projector": args.mm_projector_lr, "vision tower": args.mm_vision_tower_lr}
        trained, decayed = [], set()
        for name, parameter in named_model_parameters(self.model):
            if parameter.stop_gradient:
                continue
            trained.append(parameter)
            rate = rates.get(part_of(name))
            ratio = 1.0 if rate in (None, args.learning_rate) else rate / args.learning_rate
            if name.endswith(".lora_B"):
                ratio *= args.lora_plus_scale
            parameter.optimize_attr["learning_rate"] = ratio
            if not any(part in name for part in ("bias", "norm", "ln_pre", "ln_post")):
                decayed.add(parameter.name)
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if hasattr(optimizer_class, "_create_master_weight") and args.fp16_opt_level == "O2":
            options["multi_precision"] = True
        self.optimizer = optimizer_class(
            learning_rate=lr_scheduler if lr_scheduler is not None else self.lr_scheduler,
            parameters=trained,
            weight_decay=args.weight_decay,
            apply_decay_param_fun=lambda name: name in decayed,
            grad_clip=nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm > 0 else None,
            **options,
        )
        return self.optimizer

    # the loop

    def train(self, resume_from_checkpoint: Any = None, ignore_keys_for_eval: Any = None) -> TrainOutput:
        """Trains, from the start or from a checkpoint folder on."""
        self.stopper.install()
        try:
            return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, ignore_keys_for_eval)
        finally:
            self.stopper.remove()

    def _inner_training_loop(
        self,
        args,
        model,
        train_dataloader,
        len_dataloader,
        max_steps,
        num_train_epochs,
        num_update_steps_per_epoch,
        num_train_samples,
        resume_from_checkpoint,
        ignore_keys_for_eval,
    ):
        began = time.time()
        if resume_from_checkpoint is not None and not args.ignore_load_lr_and_optim:
            self._resumed_from = Path(resume_from_checkpoint)
            self._progress = _read_json(self._resumed_from / PROGRESS_FILE)
            self._progress["to_restore"] = True
            self._best_metrics = self._progress.get("best_metrics")
            self._tokens_seen = self._progress["supervised_tokens"]
            self._tokens_at_log = self._progress["supervised_tokens_at_log"]
            state = TrainerState.load_from_json(str(self._resumed_from / STATE_FILE))
            epoch, step = divmod(state.global_step, num_update_steps_per_epoch)
            train_dataloader.epoch = epoch
            train_dataloader.skip = 0 if args.ignore_data_skip else step * args.gradient_accumulation_steps
            if state.global_step >= max_steps:
                # the loop of the base class would take one step more
                if state.global_step > max_steps and args.should_log:
                    logger.warning(
                        "Step %d, which the run goes on from, lies beyond the %d steps that are asked for; nothing is trained.",
                        state.global_step,
                        max_steps,
                    )
                self.state = state
                self.state.max_steps = max_steps
                self._find_best()
                self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
                try:
                    if self._progress["evaluation_pending"]:
                        self._update_best(self.evaluate(), self._resumed_from)
                except _Stop:
                    self.stopper.stopped = True
                self.is_in_train = False
                metrics = {"train_loss": self._progress["total_loss"] / max(state.global_step, 1)}
                self.control = self.callback_handler.on_train_end(args, self.state, self.control)
                self._take_best()
                return TrainOutput(state.global_step, metrics["train_loss"], metrics)
        best_at_end, args.load_best_model_at_end = args.load_best_model_at_end, False
        try:
            output = super()._inner_training_loop(
                args,
                model,
                train_dataloader,
                len_dataloader,
                max_steps,
                num_train_epochs,
                num_update_steps_per_epoch,
                num_train_samples,
                resume_from_checkpoint,
                ignore_keys_for_eval,
            )
        except _Stop:  # in the evaluation that the run was to make first, so its checkpoint still asks for it
            self.stopper.stopped = True
            self.control = self.callback_handler.on_train_end(args, self.state, self.control)
            output = TrainOutput(self.state.global_step, float("nan"), {})
        except UnreadableBatch:
            if self._running_loss is None or args.world_size > 1:
                raise
            self._save_checkpoint(model)
            # a signal to the whole process group ends the processes that read the data, too
            if self.stopper.signal_number is None:
                self._tell_saved()
                raise
            self.stopper.stopped = True
            self.control = self.callback_handler.on_train_end(args, self.state, self.control)
            output = TrainOutput(self.state.global_step, float("nan"), {})
        finally:
            args.load_best_model_at_end = best_at_end
        self._take_best()
        self.trained_supervised_tokens = self._tokens_seen
        output.metrics["train_seconds"] = time.time() - began
        return output

    def _take_best(self) -> None:
        """``load_best_model_at_end``: the weights of the best checkpoint, if there is one."""
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best and not self.interrupted:
            logger.info("the best model is that of %s.", best)
            step = TrainerState.load_from_json(str(Path(best) / STATE_FILE)).global_step
            if step != self.state.global_step:
                load_trained_weights(self.model, Path(best))
                self._loaded_best = step

    def _find_best(self) -> None:
        """The best checkpoint of a run that goes on, where it is now: the run's folder may have been moved."""
        recorded = self.state.best_model_checkpoint
        if recorded is None:
            return
        here = Path(self.args.output_dir) / Path(recorded).name
        best = next((place for place in (here, Path(recorded)) if place.is_dir()), None)
        if best is None:
            logger.warning(
                "%s, the best checkpoint so far, isn't there any more; the best of the steps to come counts.", recorded
            )
            self.state.best_metric = self._best_metrics = None
        self.state.best_model_checkpoint = None if best is None else str(best)

    def _maybe_log_save_evaluate(self, tr_loss, model, epoch, ignore_keys_for_eval, **kwargs):
        self._running_loss = tr_loss
        by_epoch = self.args.evaluation_strategy == IntervalStrategy.EPOCH
        ends_epoch = by_epoch and abs(self.state.epoch - round(self.state.epoch)) < 1e-9
        if self.stopper.stopped and (self.control.should_evaluate or (self.control.should_save and ends_epoch)):
            self._save_for_later_evaluation(model)
            return
        try:
            super()._maybe_log_save_evaluate(tr_loss, model, epoch, ignore_keys_for_eval, **kwargs)
        except _Stop:
            self._save_for_later_evaluation(model)
        except UserError:  # of the evaluation: the step itself is done
            if self.args.world_size > 1:
                raise
            if self.stopper.signal_number is not None:
                self._save_for_later_evaluation(model)
                return
            self._save_checkpoint(model, evaluation_pending=True)
            self._tell_saved()
            raise

    def _tell_saved(self) -> None:
        if not self.args.benchmark:
            logger.warning(
                "Step %d is saved; when the data are mended, resume_from_checkpoint true goes on from there.",
                self.state.global_step,
            )

    def _save_for_later_evaluation(self, model) -> None:
        """A signal came while, or before, this step was evaluated: the evaluation is made when the run goes on."""
        self._save_checkpoint(model, evaluation_pending=True)
        self.stopper.stopped = self.control.should_training_stop = True
        self.control.should_evaluate = self.control.should_save = self.control.should_log = False

    def log(self, logs: Dict[str, float], **kwargs) -> None:
        if "loss" in logs:
            tokens, self._tokens_at_log = self._tokens_seen - self._tokens_at_log, self._tokens_seen
            logs["supervised_tokens"] = tokens
            if logs.get("interval_runtime"):
                logs["tokens_per_second"] = round(tokens / logs["interval_runtime"], 2)
        super().log(logs, **kwargs)

    def _print_timer(self) -> None:
        """``skip_profile_timer: false``: where the time of a step went."""
        if self.timers is not None:
            times = self.timers.log(self.timers.timers.keys(), reset=True)
            logger.info("step %d, milliseconds: %s", self.state.global_step, times)

    def log_trained_tokens(self) -> None:
        """``count_trained_tokens``: what the base class counts, summed over the ranks."""
        if self.args.count_trained_tokens:
            counts = self._sum_over_ranks([float(self.trained_effective_tokens), float(self.trained_tokens)])
            logger.info("trained on %d tokens so far, %d with padding.", *counts)

    # checkpoints

    def _save_checkpoint(self, model, metrics: Optional[Dict[str, float]] = None, evaluation_pending: bool = False):
        """Writes ``checkpoint-N`` aside, then gives it its name; nothing in a benchmark."""
        args, step = self.args, self.state.global_step
        if args.benchmark:
            return
        folder = Path(args.output_dir)
        final, partial = folder / f"checkpoint-{step}", folder / f"{PARTIAL}checkpoint-{step}"
        if metrics is not None:
            self._update_best(metrics, final)
        if args.should_save:
            remove_tree(partial)
            partial.mkdir(parents=True)
        self._barrier()
        if args.should_save:
            self._write_model(partial)
        if not args.ignore_save_lr_and_optim:
            name = self._optimizer_file()
            if name is not None:
                save_optimizer(self.optimizer, self.model, partial / name)
        mean_loss = self._sum_over_ranks([float(self._running_loss)])[0] / self._ranks
        if args.should_save:
            self.state.save_to_json(str(partial / STATE_FILE))
            write_json(
                partial / PROGRESS_FILE,
                {
                    "loss_since_log": mean_loss,
                    "total_loss": self._total_loss_scalar,
                    "last_logged_step": self._globalstep_last_logged,
                    "supervised_tokens": self._tokens_seen,
                    "supervised_tokens_at_log": self._tokens_at_log,
                    "evaluation_pending": evaluation_pending,
                    "best_metrics": self._best_metrics,
                    "scheduler": self.lr_scheduler.state_dict(),
                    "scaler": _plain(self.scaler.state_dict()) if self.do_grad_scaling else None,
                },
            )
        self._barrier()
        if args.should_save:
            seal(partial)
            publish(partial, final)
            if args.save_total_limit:
                remove_old_checkpoints(folder, args.save_total_limit, self.state.best_model_checkpoint)
        self._barrier()

    def _optimizer_file(self) -> Optional[str]:
        """Where this rank writes, or reads, the optimizer's state; None if another rank writes it."""
        args = self.args
        if not args.use_hybrid_parallel:
            return "optimizer.safetensors" if args.should_save else None
        if args.data_parallel_rank > 0:
            return None
        return f"optimizer-{args.sharding_parallel_rank + 1:05d}-of-{args.sharding_parallel_degree:05d}.safetensors"

    def _write_model(self, folder: Path) -> None:
        """Weights, config, tokenizer and image processor."""
        save_trained_weights(self.model, folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def save_model(self, output_dir: Optional[str] = None, merge_tensor_parallel: bool = False) -> None:
        """Writes the model and all that the chat needs into ``output_dir``, all files or none."""
        if self.args.should_save:
            with write_aside(Path(output_dir or self.args.output_dir)) as aside:
                self._write_model(aside)
        self._barrier()

    def _update_best(self, metrics: Dict[str, float], checkpoint: Path) -> None:
        """Notes ``checkpoint`` as the best if its metric is."""
        name = self.args.metric_for_best_model
        if name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise UserError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}, but evaluation gives "
                f"{', '.join(sorted(key for key in metrics if key.startswith('eval_')))}."
            )
        better = np.greater if self.args.greater_is_better else np.less
        if self.state.best_metric is None or better(metrics[name], self.state.best_metric):
            self.state.best_metric, self._best_metrics = metrics[name], metrics
            self.state.best_model_checkpoint = str(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any = None) -> None:
        if resume_from_checkpoint:
            load_trained_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        args = self.args
        if checkpoint is None or args.ignore_load_lr_and_optim:
            return
        folder = Path(checkpoint)
        name = "optimizer.safetensors"
        if args.use_hybrid_parallel:
            name = f"optimizer-{args.sharding_parallel_rank + 1:05d}-of-{args.sharding_parallel_degree:05d}.safetensors"
        if not (folder / name).exists():
            held = ", ".join(sorted(path.name for path in folder.glob("optimizer*"))) or "no optimizer's state"
            raise UserError(
                f"{folder} has no {name} but {held}; go on with as many devices and the sharding that wrote it, or set "
                "ignore_load_lr_and_optim to true."
            )
        load_optimizer(self.optimizer, self.model, folder / name)
        progress = _read_json(folder / PROGRESS_FILE)
        self.lr_scheduler.set_state_dict(progress["scheduler"])
        if self.do_grad_scaling and progress["scaler"]:
            self.scaler.load_state_dict(_arrays(progress["scaler"]))
        if args.offload_optim:
            self._offload_optimizer()

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Nothing to load: every step has a seed of its own."""

    # evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Optional[List[str]] = None, metric_key_prefix: str = "eval"
    ) -> Dict[str, float]:
        """``eval_loss`` per supervised token, ``eval_token_accuracy``, and with ``eval_with_do_generation`` what
        ``evaluation.evaluate_answers`` gives; the answers go into ``eval_predictions-STEP.jsonl``.
        """
        self._memory_tracker.start()
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        loader = self.get_eval_dataloader(dataset)
        began, args = time.time(), self.args
        training = self.model.training
        self.model.eval()
        try:
            with paddle.no_grad(), self._evaluation_precision():
                metrics = evaluate_loss(
                    self.model,
                    self._watched(loader),
                    sum_over_ranks=self._sum_over_ranks,
                    read_every=args.eval_accumulation_steps,
                    max_batches=args.max_evaluate_steps,
                    loss_only=args.prediction_loss_only,
                )
                if args.eval_with_do_generation and not args.prediction_loss_only:
                    metrics.update(self._evaluate_answers(dataset, f"{metric_key_prefix}_predictions"))
        finally:
            if training:
                self.model.train()
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        batches = min(len(loader), args.max_evaluate_steps) if args.max_evaluate_steps > 0 else len(loader)
        seen = min(len(dataset), batches * args.per_device_eval_batch_size * self._ranks)
        metrics.update(speed_metrics(metric_key_prefix, began, num_samples=seen, num_steps=batches))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        self._evaluated_at, self._last_metrics = self.state.global_step, metrics
        return metrics

    def write_predictions(self, dataset: Any = None) -> Dict[str, float]:
        """``do_predict``: answers to every question of the dataset, into ``predictions-STEP.jsonl``, and their scores."""
        self.model.eval()
        with paddle.no_grad(), self._evaluation_precision():
            scores = self._evaluate_answers(dataset if dataset is not None else self.eval_dataset, "predictions")
        return {f"predict_{key}": value for key, value in scores.items()}

    def _evaluate_answers(self, dataset: Any, stem: str) -> Dict[str, float]:
        args = self.args
        step = self.state.global_step if self._loaded_best is None else self._loaded_best
        most = args.per_device_eval_batch_size * args.max_evaluate_steps if args.max_evaluate_steps > 0 else None
        return evaluate_answers(
            self._inner_model,
            self.processor,
            dataset,
            rank=args.dataset_rank,
            ranks=self._ranks,
            batch_size=args.per_device_eval_batch_size,
            max_new_tokens=args.max_new_tokens,
            max_questions=most,
            file=Path(args.output_dir) / f"{stem}-{step}.jsonl",
            watch=self._watched,
        )

    def _watched(self, batches):
        """Passes batches on, until the run is asked to stop."""
        for batch in batches:
            if self.is_in_train and self.stopper.asked():
                raise _Stop
            yield batch

    def _evaluation_precision(self):
        """``fp16_full_eval`` and ``bf16_full_eval``, else the precision of training; float32 on a CPU."""
        if self.args.fp16_full_eval or self.args.bf16_full_eval:
            half = "float16" if self.args.fp16_full_eval else "bfloat16"
            return paddle.amp.auto_cast(level="O2", dtype=half)
        return self.autocast_smart_context_manager()


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}; name another checkpoint.") from None


def _plain(state: Dict[str, Any]) -> Dict[str, Any]:
    """A GradScaler's state as JSON: arrays as their numbers."""
    return {
        key: {"dtype": str(value.dtype), "values": value.tolist()} if isinstance(value, np.ndarray) else value
        for key, value in state.items()
    }


def _arrays(state: Dict[str, Any]) -> Dict[str, Any]:
    return {
        key: np.asarray(value["values"], value["dtype"]) if isinstance(value, dict) else value
        for key, value in state.items()
    }
