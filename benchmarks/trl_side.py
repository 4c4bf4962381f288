"""TRL's side: GRPOTrainer's own `train()`, held between its steps by a callback.

Precisions: `default` leaves GRPOConfig's defaults alone (float32 weights; bfloat16 autocast and
gradient checkpointing in training); `float32` and `bfloat16` are that type throughout, without
autocast and without checkpointing, which only cost time here.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Protocol

from benchmarks.shapes import Job, reward_of
from benchmarks.worker import Line, peak_rss_mb


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward_of(ids) for ids in completion_ids]


def make_config(job: Job) -> Any:
    from trl import GRPOConfig

    shape, settings = job.shape, job.settings
    precision: dict[str, Any] = {}
    if job.precision != "default":
        precision = {"bf16": False, "gradient_checkpointing": False}
        precision["model_init_kwargs"] = {"dtype": job.precision}
    return GRPOConfig(
        output_dir=f"{job.directory}/trl_{shape.name}_{job.precision}",
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=shape.sequences // settings.micro_batch_size,
        num_generations=shape.group_size,
        max_completion_length=shape.response_limit,
        max_steps=job.steps,
        shuffle_dataset=False,
        loss_type="grpo",
        scale_rewards="group",
        beta=0.0,
        num_iterations=1,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_eps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip_grad,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=settings.seed,
        **precision,
    )


class Generated(Protocol):
    """What the turns ask of the trainer about its last generation."""

    rollout_s: float
    rollout_cpu_s: float
    response_lens: tuple[int, ...]


def timed_trainer() -> type[Any]:
    """GRPOTrainer that keeps the seconds of its last generation and the lengths it made."""
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        rollout_s = rollout_cpu_s = 0.0
        response_lens: tuple[int, ...] = ()

        def _generate(self, prompts: list[Any]) -> Any:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            output = super()._generate(prompts)
            self.rollout_s = time.perf_counter() - begin
            self.rollout_cpu_s = time.process_time() - begin_cpu
            self.response_lens = tuple(map(len, output[1]))
            return output

    return TimedTrainer


def turns(line: Line, generated: Generated) -> Any:
    """A callback that holds the trainer between steps.

    A step lasts from the parent's word to the end of its log: data, rollout, training, logging.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        begin = begin_cpu = 0.0

        def wait(self, control: Any) -> None:
            control.should_training_stop = not line.wait_for_turn()
            self.begin, self.begin_cpu = time.perf_counter(), time.process_time()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.wait(control)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "loss" not in logs:
                return
            line.send(
                "step",
                step_s=time.perf_counter() - self.begin,
                step_cpu_s=time.process_time() - self.begin_cpu,
                rollout_s=generated.rollout_s,
                rollout_cpu_s=generated.rollout_cpu_s,
                response_lens=generated.response_lens,
                **{name: logs[name] for name in ("loss", "grad_norm", "entropy", "reward")},
            )
            self.wait(control)

    return Turns()


def main() -> None:
    line = Line()
    job = Job.from_json(sys.argv[1])
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(job.settings.threads)
    rows = [json.loads(row)["input"] for row in job.prompts_path.read_text().splitlines()]
    trainer = timed_trainer()(
        model=str(job.model_path),
        reward_funcs=even_tokens,
        args=make_config(job),
        train_dataset=Dataset.from_dict({"prompt": rows}),
    )
    trainer.add_callback(turns(line, trainer))
    line.send(
        "ready",
        versions={
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        dtype=str(trainer.model.dtype).removeprefix("torch."),
        autocast=bool(trainer.args.bf16),
        gradient_checkpointing=bool(trainer.args.gradient_checkpointing),
    )
    trainer.train()
    line.send("closed", peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
