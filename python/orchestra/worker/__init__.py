"""The torch worker: loads one shard of a model, executes the steps that the agent plans, and draws the tokens.

Reading order: `runtime` (start and end), `leading` (the loop), `runner` (one step), `models` over `layers` (the forward
pass), `attention` over `kv_cache`, `sampler_slots` and `sampler`; `loader` and `sharding` bring the weights in,
`parallel` and `plan_channel` join the ranks.
"""
