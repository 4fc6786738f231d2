# %% [markdown]
# # The losses, on four numbers
#
# A preference loss never sees an image, a text or a model. For a pair of completions it sees four numbers: the
# log-probability of the better (*chosen*) and of the worse (*rejected*) completion, under the model that is
# trained (the *policy*) and under the model it started from (the *reference*).
#
# You will see: the three losses of Mixed Preference Optimization (MPO,
# [arXiv 2411.10442](https://arxiv.org/abs/2411.10442)) computed by hand and by `mpo.losses`; their curves and
# gradients; what the reward shift delta does; and why the mixture is safer than DPO alone.
#
# It needs no model and runs in seconds.
#
# To run it yourself: `pip install '.[notebooks]'` in a clone of the repository, and Jupyter or VS Code.

# %%
import matplotlib.pyplot as plt
import torch

from mpo.losses import BCO, DPO, IPO, SFT, Hinge, Mixture, PairLogps

CHOSEN, REJECTED, GREY = "#2563a8", "#c2571a", "#52606d"
plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}

# %% [markdown]
# ## One pair
#
# The chosen completion has 5 tokens, the rejected one 4. Since the start, training has made the chosen one more
# likely (from -12 to -10) and the rejected one less likely (from -13 to -16).

# %%
pair = PairLogps(
    chosen=torch.tensor([-10.0]),
    rejected=torch.tensor([-16.0]),
    ref_chosen=torch.tensor([-12.0]),
    ref_rejected=torch.tensor([-13.0]),
    chosen_tokens=torch.tensor([5]),
    rejected_tokens=torch.tensor([4]),
)
mixture = Mixture([(0.8, DPO(beta=0.1)), (0.2, BCO(beta=0.1)), (1.0, SFT())])
output = mixture(pair)

# %% [markdown]
# By hand, with beta = 0.1 and the logistic function $\sigma$:
#
# | | formula | value |
# |---|---|---|
# | reward of the chosen completion | $r_c = \beta\,(-10 + 12)$ | 0.2 |
# | reward of the rejected one | $r_r = \beta\,(-16 + 13)$ | -0.3 |
# | margin | $r_c - r_r$ | 0.5 |
# | preference, DPO: which of the two is better? | $-\log\sigma(0.5)$ | 0.4741 |
# | reward shift: the mean of all rewards so far | $\delta = (0.2 - 0.3) / 2$ | -0.05 |
# | quality, BCO: is each good by itself? | $-\log\sigma(r_c-\delta) - \log\sigma(\delta-r_r) = -2\log\sigma(0.25)$ | 1.1519 |
# | generation, SFT: can the model write the chosen one? | $10 / 5$ | 2.0 |
# | MPO | $0.8 \cdot 0.4741 + 0.2 \cdot 1.1519 + 1 \cdot 2$ | 2.6096 |
#
# The bars are what the library computes, the crosses are the table.

# %%
by_hand = {"DPO": 0.4741, "BCO": 1.1519, "SFT": 2.0, "MPO": 2.6096}
computed = [*(term.item() for term in output.terms.values()), output.loss.item()]

figure, axes = plt.subplots(figsize=(6, 3))
axes.bar([*by_hand], computed, color=[CHOSEN, REJECTED, GREY, "#1f2933"], width=0.5, label="mpo.losses")
axes.plot([*by_hand], [*by_hand.values()], "x", color="black", markersize=12, label="by hand")
axes.bar_label(axes.containers[0], fmt="%.4f", padding=7)
axes.set(ylabel="loss in nats", ylim=(0, 3.1))
axes.legend(frameon=False)
assert torch.allclose(torch.tensor(computed), torch.tensor([*by_hand.values()]), atol=1e-4)
plt.show()

# %% [markdown]
# ## The preference loss and its gradient against the margin
#
# Losses take many pairs at once. Here 401 pairs, whose margins go from -20 to 20; the rejected completion stays
# where it was. The right plot is what training feels: how hard a step pulls at a pair.
#
# * **DPO** pulls at pairs that are ranked wrongly (left of 0) with full force, and lets go of pairs that are
#   ranked rightly.
# * **Hinge** lets go at once when the margin reaches 1.
# * **IPO** wants one certain margin. It pulls a pair back that has more.

# %%
BETA = 0.5
margins = torch.linspace(-20, 20, 401)
logratio = (margins / BETA).requires_grad_()
zeros, ones = torch.zeros(401), torch.ones(401)
pairs = PairLogps(logratio, zeros, zeros, zeros, ones, ones)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for loss, name, colour in ((DPO(BETA), "DPO", CHOSEN), (Hinge(BETA), "hinge", REJECTED), (IPO(BETA), "IPO", GREY)):
    values = loss(pairs)
    (gradient,) = torch.autograd.grad(values.sum(), logratio)
    left.plot(margins, values.detach(), color=colour, label=name)
    right.plot(margins, -gradient / BETA, color=colour)
left.set(title="loss", xlabel="margin", xlim=(-6, 6), ylim=(-0.2, 7))
right.set(title="pull towards a larger margin", xlabel="margin", xlim=(-6, 6), ylim=(-1.5, 1.5))
right.axhline(0, color="#cbd2d9", lw=0.8, zorder=0)
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What delta does
#
# BCO is a classifier: it should call the chosen completion good and the rejected one bad, each by itself. The
# border between good and bad is the reward shift delta, the mean of all rewards that training has seen. A larger
# delta moves both curves to the right.

# %%
rewards = torch.linspace(-4, 4, 201)
zero = torch.zeros(201)
far_below, far_above = zero - 50, zero + 50  # the other completion of each pair, which adds nothing to the loss
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for delta, style in ((-1.0, ":"), (0.0, "-"), (1.0, "--")):
    bco = BCO(beta=1.0)
    bco.shift(torch.tensor([delta]))  # a reward that was seen: their mean is delta
    bco.eval()  # from here on delta stays
    of_chosen = bco(PairLogps(rewards, far_below, zero, zero, zero + 1, zero + 1))
    of_rejected = bco(PairLogps(far_above, rewards, zero, zero, zero + 1, zero + 1))
    left.plot(rewards, of_chosen, style, color=CHOSEN, label=f"delta = {delta:g}")
    right.plot(rewards, of_rejected, style, color=REJECTED, label=f"delta = {delta:g}")
left.set(title="loss of a chosen completion", xlabel="its reward", ylabel="nats")
right.set(title="loss of a rejected completion", xlabel="its reward")
left.legend(frameon=False)
right.legend(frameon=False)
plt.show()

# %% [markdown]
# Why does that matter? In practice *both* rewards often fall during training, the rejected one further. Here is
# such a run, simulated by 300 noisy rewards. Without a shift, BCO takes every completion for bad after a while:
# it pulls at the chosen ones with all its force and has nothing left to say about the rejected ones. Delta
# follows the rewards, late, as it is a mean of all of them, and the two come closer to balance again.

# %%
torch.manual_seed(0)
steps = torch.arange(300)
fallen = 1 - torch.exp(-steps / 50)
falling_c = -2.0 * fallen + 0.3 * torch.randn(300)
falling_r = -3.5 * fallen + 0.3 * torch.randn(300)
pulls, deltas = {}, []
for shift in ("none", "running_mean"):
    bco = BCO(beta=1.0, reward_shift=shift)
    pulls[shift] = []
    for c, r in zip(falling_c, falling_r, strict=True):
        chosen, rejected, zero = c.view(1).requires_grad_(), r.view(1).requires_grad_(), torch.zeros(1)
        bco(PairLogps(chosen, rejected, zero, zero, zero + 1, zero + 1)).sum().backward()
        pulls[shift].append((-chosen.grad.item(), rejected.grad.item()))
        if bco.shift is not None:
            deltas.append(bco.shift.value.item())

figure, (left, *rest) = plt.subplots(1, 3, figsize=(11, 3.2))
left.plot(steps, falling_c, color=CHOSEN, lw=0.8, label="reward of chosen")
left.plot(steps, falling_r, color=REJECTED, lw=0.8, label="reward of rejected")
left.plot(steps, deltas, color="black", lw=2, label="delta")
left.set(title="rewards that fall", xlabel="step")
left.legend(frameon=False, fontsize=8)
for axes, shift, title in zip(rest, pulls, ("pull of BCO, no shift", "pull of BCO, with delta"), strict=True):
    up, down = torch.tensor(pulls[shift]).T
    axes.plot(steps, up, color=CHOSEN, lw=0.9, label="chosen, up")
    axes.plot(steps, down, color=REJECTED, lw=0.9, label="rejected, down")
    axes.set(title=title, xlabel="step", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Why a mixture?
#
# Each point of the map is a pair: how much training has changed the log-probability of the chosen completion (to
# the right) and of the rejected one (up). Arrows show where a step goes. DPO knows only the difference, so all
# its arrows are parallel: it is content when *both* become less likely, as long as the rejected one falls more.
# In the lower left corner a model ends up that ranks well and writes nonsense. In the mixture, BCO and SFT turn
# the arrows to the right: the chosen completion itself must become more likely.

# %%
grid = torch.linspace(-30, 30, 61)
u_c, u_r = (axis.flatten().requires_grad_() for axis in torch.meshgrid(grid, grid, indexing="xy"))
count = u_c.numel()
before, tokens = torch.full((count,), -40.0), torch.full((count,), 40)
changed = PairLogps(before + u_c, before + u_r, before, before, tokens, tokens)
methods = {
    "DPO": Mixture([(1.0, DPO(beta=0.1))]),
    "MPO": Mixture([(0.8, DPO(beta=0.1)), (0.2, BCO(beta=0.1)), (1.0, SFT())]),
}
figure, both = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
for axes, (name, method) in zip(both, methods.items(), strict=True):
    values = method(changed).per_pair
    g_c, g_r = (-g.view(61, 61) for g in torch.autograd.grad(values.sum(), (u_c, u_r)))
    drawn = axes.contourf(grid, grid, values.detach().view(61, 61), 14, cmap="Blues")
    figure.colorbar(drawn, ax=axes)
    some = slice(4, None, 7)
    axes.quiver(grid[some], grid[some], g_c[some, some], g_r[some, some], color="#1f2933", width=0.005)
    axes.set(title=f"loss of {name}", xlabel="change of log-prob of chosen", aspect="equal")
both[0].set_ylabel("change of log-prob of rejected")
plt.show()

# %% [markdown]
# ## Next
#
# * Other losses: `IPO`, `APOZero`, `SPPO`, `ORPO` and a dozen more are in `mpo.losses`; a mixture takes any of
#   them, and one of your own: a class with a `forward` that takes a `PairLogps` and returns one value for each
#   pair.
# * The next notebook trains a model with this mixture: [2_train.ipynb](2_train.ipynb).
