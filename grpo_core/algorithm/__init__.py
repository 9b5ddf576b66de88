"""The mathematics of GRPO as pure functions: advantages, losses, KL, entropy, corrections, controllers.

R predicted tokens of M completions are given flat, with the completion that each belongs to. A loss is
`Σ_t weight_t · loss_t`: a loss type says how a token's loss is made from its ratio (`policy_loss`) and how token
losses are averaged (`token_weights`). Weights are known before the first backward pass and count the whole optimiser
step, so that micro-batches and ranks only add up.
"""
