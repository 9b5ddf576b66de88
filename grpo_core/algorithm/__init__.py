"""The mathematics of GRPO as pure functions: advantages, losses, KL, entropy, corrections, controllers.

Tensors of R predicted tokens are flat; `completion_index` holds each token's completion among the M completions. A loss
is `Σ_t weight_t · loss_t`: a loss type computes a token's loss from its ratio (`policy_loss`) and defines how token
losses are averaged (`token_weights`). Weights are known before the first backward pass and count the whole optimiser
step, so the losses of micro-batches and ranks simply add up.
"""
