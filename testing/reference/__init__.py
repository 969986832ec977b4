"""The reference: all stages of an asynchronous pipeline in one process, from the written definition.

An engine is right where its weights equal the reference's with difference 0.  That says something only as long as the
two share no code, so nothing in here imports `paci_schedule`.

* `rules`: when an update takes whose gradient norm, and which sum of tied gradients: pure functions.
* `stage` and `pipeline`: a stage of any framework, and the rounds of the pipe.
* `updaters` and `torch_stage`: a stage of plain PyTorch with DeepSpeed's arithmetic; `deepspeed` carries out jobs.
* `megatron`: a stage of megatron-core's own parts, and its jobs.
* `prediction`: steps of another optimizer, on copies of the weights.
"""
