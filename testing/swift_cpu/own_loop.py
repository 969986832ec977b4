"""python own_loop.py ARGUMENTS...: a training loop of one's own, in the place of ms-swift's.

The pipe is empty at every --save_steps.  The last rank writes the losses where ms-swift would.
"""

import json
import sys

from megatron.core.pipeline_parallel import get_forward_backward_func
from swift.megatron.pipelines.train.pretrain import MegatronPretrain


def main() -> None:
    job = MegatronPretrain(sys.argv[1:])
    args = job.args
    data = job._prepare_dataset()
    args.init_iters(*data)
    trainer = job.prepare_trainer()
    batches, _ = trainer.setup_training(*data)
    trainer.config.paci = {"train_iters": args.train_iters, "drain_interval": args.save_steps}
    for iteration in range(args.train_iters):
        for model in trainer.wrapped_models:
            model.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        metrics = get_forward_backward_func()(
            forward_step_func=trainer.forward_step,
            data_iterator=batches,
            model=trainer.wrapped_models,
            num_microbatches=args.num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        _, norm, _ = trainer.optimizer.step()
        trainer.opt_param_scheduler.step(increment=args.global_batch_size)
        if metrics:
            loss, tokens = sum(each["loss"] for each in metrics)
            told = {
                "iteration": f"{iteration + 1}/{args.train_iters}",
                "loss": round((loss / tokens).item(), 8),
                "grad_norm": round(norm, 8),
                "learning_rate": round(trainer.optimizer.param_groups[0]["lr"], 8),
            }
            with open(f"{args.output_dir}/logging.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
