"""The mathematics of GRPO as pure functions: advantages, losses, KL, entropy, corrections, controllers.

Tensors of R predicted tokens are flat; `completion_index` says which of the M completions each token belongs to. A loss
is `Σ_t weight_t · loss_t`: a loss type makes a token's loss from its ratio (`policy_loss`) and says how token losses
are averaged (`token_weights`). Weights are known before the first backward pass and count the whole optimiser step, so
that micro-batches and ranks only add up.
"""
