"""LaSRO (arXiv 2411.15247): finetuning models that draw in one or two steps, where per-step likelihoods end.

    python lasro.py --preset toy-turbo                          # a laptop, minutes: the miniature, distilled to two steps
    torchrun --nproc_per_node=8 lasro.py --preset sd-turbo      # where there are GPUs

Of two steps the last draws no noise: half the chain has no likelihood, and a policy gradient leaves out what theta does in it. So
the black-box reward is learned instead, by a surrogate R_psi on latents, and the generator descends through that:

    L_surr = -mean log sigma(R_psi(z_w, c) - R_psi(z_l, c))           over pairs of a prompt and a step, w better than l
    L_gen  = c_0 L_lcm - sum_j c_j mean S_j[R_psi(z_j, c)]            z_j: what the generator draws in j steps

The authors released no code, and little of the paper's body could be had. What had to be reconstructed is marked OURS.

Letters: M pictures of one process, T steps of the generator, N prompts of an epoch, B pictures of each (the paper's N_s).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import LASRO_PRESETS, LasroConfig, check_lasro
from plumbing import processes
from plumbing.anchor import Anchor, consistency_scheduler, few_step_policy, load_anchor
from plumbing.describe import describe_lasro
from plumbing.errors import one_line_errors
from plumbing.flags import go_on, parse
from plumbing.networks import GuidedUNet
from plumbing.pipeline import count_truncated, encode_prompts, score
from plumbing.processes import RANK, WORLD_SIZE, Share, all_gather, all_or_none, all_sum_gradients
from plumbing.prompts import draw_prompts
from plumbing.replay import Replay
from plumbing.run import Run
from plumbing.surrogate import record, surrogate_of, surrogate_scores
from plumbing.trainable import add_adapters, trained_parameters
from rdp_loss import mean_over_pairs, pairwise_differences
from rewards import Reward, RewardError
from sampler import Condition, Policy, draw_noise, gaussian
from train import load, with_names


def levels(values: Tensor, i: Tensor, like: Tensor) -> Tensor:
    """Of noise levels (T+1,) those of steps i (M,), to multiply latents (M, C, H, W) with."""
    return values[i].to(like).view(-1, 1, 1, 1)


def consistency(policy: Policy, x_t: Tensor, i: Tensor, cond: Condition) -> Tensor:
    """f_theta(x_t, t, c): the picture that the probability-flow ODE through x_t ends in, in one call -> (M, C, H, W).

    policy: with a consistency schedule, whose steps go to f and draw all noise anew; i: (M,) indices of its steps.
    OURS: no c_skip and c_out. They are for f(x, t) = x where x is clean, and predicted x_0 is x there by itself; LCM's hold it at
    the first timestep, where some schedules (the miniature's) still have noise.
    """
    mean, _ = gaussian(policy, x_t, i, cond)
    return mean / levels(policy.schedule.alpha, i + 1, mean)


def generate(policy: Policy, noise: Tensor, cond: Condition) -> Tensor:
    """What the generator draws in one step, in two, ... in T, from noise (M, T, C, H, W), x_T first -> (M, T, C, H, W).

    OURS: each picture's gradient stops at the one before it, so that every step learns from its own surrogate alone.
    """
    schedule, z, x_t = policy.schedule, [], noise[:, 0]
    for step in range(noise.shape[1]):
        i = torch.full((len(noise),), step, device=policy.device)
        z.append(consistency(policy, x_t, i, cond))
        if step + 1 < noise.shape[1]:
            alpha, s = (levels(values, i + 1, x_t) for values in (schedule.alpha, schedule.s))
            x_t = alpha * z[-1].detach() + s * noise[:, step + 1]
    return torch.stack(z, 1)


def consistency_loss(
    student: Policy, target: Policy, teacher: Policy, x_0: Tensor, noise: Tensor, i: Tensor, cond: Condition
) -> Tensor:
    """L_lcm: mean square (OURS) of f_theta(x_t) - f_target(x_s), where x_s is one step of the teacher's ODE further -> scalar.

    x_0, noise: (M, C, H, W); i: (M,) steps of the three policies, which have the same levels: the student's and the target's with
    a consistency schedule, the teacher's with eta = 0. Where the step ends at the clean picture, f_target(x_s) is x_s itself.
    """
    alpha, s = (levels(values, i, x_0) for values in (teacher.schedule.alpha, teacher.schedule.s))
    x_t = alpha * x_0 + s * noise
    with torch.no_grad():
        x_s, _ = gaussian(teacher, x_t, i, cond)
        end = i + 1 == len(teacher.schedule.timesteps)
        goal = torch.where(end.view(-1, 1, 1, 1), x_s, consistency(target, x_s, (i + 1).masked_fill(end, 0), cond))
    return F.mse_loss(consistency(student, x_t, i, cond), goal)


def surrogate_loss(scores: Tensor, rewards: Tensor) -> Tensor:
    """L_surr (Bradley-Terry): scores R_psi and rewards (G, B) of G groups of pictures of one prompt and step -> scalar.

    OURS: the mean over the pairs of each group with different rewards, then over groups; never over steps or prompts.
    """
    return mean_over_pairs(-F.logsigmoid(pairwise_differences(scores)), rewards)


class Normaliser(nn.Module):
    """S_j: R_psi of step j, centred, scaled and clipped to [-1, 1] by moving averages of its mean and of its largest deviation.

    So the loss does not grow with R, whose scale hard labels leave free, and steps weigh what c_j says.
    OURS: S(R) = clamp((R - m) / s, -1, 1), where m and s are constants; what is clipped has no gradient.
    """

    def __init__(self, num_steps: int, decay: float):
        super().__init__()
        self.decay = decay
        for name, start in (("mean", torch.zeros(num_steps)), ("scale", torch.ones(num_steps)), ("begun", torch.tensor(False))):
            self.register_buffer(name, start)

    def forward(self, scores: Tensor) -> Tensor:
        """(M, T) -> (M, T)."""
        return ((scores - self.mean.to(scores)) / self.scale.to(scores)).clamp(-1, 1)

    def update(self, scores: Tensor) -> None:
        """After scores (M, T) of all processes; the first sets the averages."""
        left, self.begun = self.decay * self.begun, torch.tensor(True)
        self.mean = self.mean.lerp(scores.mean(0), 1 - left)
        self.scale = self.scale.lerp((scores - self.mean).abs().amax(0).clamp(min=1e-6), 1 - left)


# fmt: off
def finetune(config: LasroConfig, run: Run, pipe, policy: Policy, critic: GuidedUNet, anchor: Anchor, normaliser: Normaliser,
             replay: Replay, optimizer: torch.optim.Optimizer, prompts: list[str], reward: Reward) -> None:
    """Stage A: the surrogate learns from the untouched generator's pictures. Stage B: both learn, in turns.

    Each process draws, scores and differentiates its share. The replay buffer is of all, the same in every process.
    OURS: the surrogate has the first turn; the generator's turn has noise of its own; one AdamW, clipped gradients; all numbers.
    """
    N, B, T = config.prompts_per_epoch, config.images_per_prompt, config.num_steps
    G, P, K = config.generator_batch, config.surrogate_batch, config.generator_updates
    psi, c = list(critic.network.parameters()), torch.tensor(config.step_weights, device=policy.device)

    def descend(parameters: list, number: int, at_once: int, loss_of: Callable[[list[int]], tuple[Tensor, Tensor]]) -> Tensor:
        """One update by the mean loss of rows 0 to number - 1; loss_of(some) also gives what is returned, of all of them."""
        def backward() -> Tensor:
            told = []
            for start in range(RANK, number, WORLD_SIZE * at_once):
                some = list(range(start, number, WORLD_SIZE))[:at_once]
                loss, of_rows = loss_of(some)
                (loss * len(some) / number).backward()
                told.append(of_rows.detach())
            return torch.cat(told)

        told = all_gather(backward)
        all_sum_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        run.check_finite(told.sum(), grad_norm)
        optimizer.step()  # of these parameters alone: the others have no gradient
        optimizer.zero_grad()
        return told

    for epoch in run.epochs():
        pretraining, order = epoch < config.pretraining_epochs, torch.Generator().manual_seed(config.seed + 1_000_003 * epoch)
        drawn, share = draw_prompts(prompts, N, epoch, config.seed), Share([torch.ones(N, B, T)])
        names = [(config.seed, epoch, *divmod(row, B), 0) for row in share.rows.tolist()]
        texts = [drawn[n] for _, _, n, _, _ in names]

        @torch.no_grad()
        def draw() -> list[Tensor]:
            parts = []
            for start in range(0, len(names), config.sample_batch_size):
                some = slice(start, start + config.sample_batch_size)
                cond = encode_prompts(pipe, texts[some])
                z = generate(policy, draw_noise(policy, names[some], T), cond)
                parts.append((z.cpu(), surrogate_scores(critic, z, cond).cpu()))  # before the surrogate learns from them
            return [torch.cat(column) for column in zip(*parts, strict=True)]

        mine, scores = all_or_none(draw)
        z, scores = (share.all_gather(lambda of_mine=of_mine: of_mine).unflatten(0, (N, B)) for of_mine in (mine, scores))
        run.lap("sample")
        rewards = share.all_gather(lambda: torch.stack([
            score(pipe, mine[:, j], texts, reward, config.sample_batch_size) for j in range(T)], 1)).view(N, B, T)
        run.lap("reward")
        with run.updating():
            replay.push(drawn, z, rewards)
            if not pretraining and not normaliser.begun:
                normaliser.update(scores.flatten(0, 1))
            learned, made = [], []
            for _ in range(config.pretraining_updates if pretraining else config.surrogate_updates):
                places = replay.draw(P, N, order)

                def l_surr(some: list[int]) -> tuple[Tensor, Tensor]:
                    which = [places[row] for row in some]
                    pictures, theirs = (torch.stack([of[n] for n in which]).to(policy.device)
                                         for of in (replay.z, replay.rewards))
                    cond = encode_prompts(pipe, [replay.prompts[n] for n in which for _ in range(B)])
                    found = surrogate_scores(critic, pictures.flatten(0, 1), cond).unflatten(0, (-1, B))
                    loss = surrogate_loss(found.mT, theirs.mT)
                    return loss, loss.expand(len(some))

                learned.append(descend(psi, P, max(1, config.train_batch_size // B), l_surr))
            run.lap("surrogate")
            critic.network.requires_grad_(False)
            for k in range(0 if pretraining else K):
                told = draw_prompts(prompts, G, epoch * K + k, config.seed + 1)
                places, i = (torch.randint(most, (G,), generator=order) for most in (len(anchor.prompts), anchor.levels))

                def l_gen(some: list[int]) -> tuple[Tensor, Tensor]:
                    noise = draw_noise(policy, [(config.seed, epoch, k * G + row, 0, 2) for row in some], T + 1)
                    cond = encode_prompts(pipe, [told[row] for row in some])
                    found = surrogate_scores(critic, generate(policy, noise[:, :T], cond), cond)
                    held_to = encode_prompts(pipe, [anchor.prompts[n] for n in places[some].tolist()])
                    x_0, levels_of = (table[some].to(policy.device) for table in (anchor.x_0[places], i))
                    l_lcm = consistency_loss(*anchor.policies, x_0, noise[:, T], levels_of, held_to)
                    loss = config.anchor_weight * l_lcm - (c * normaliser(found).mean(0)).sum()
                    return loss, torch.cat([found, l_lcm.expand(len(some), 1)], 1)

                made.append(descend(run.trained, G, config.train_batch_size, l_gen))
                normaliser.update(made[-1][:, :T])
                anchor.target.update_parameters(pipe.unet)
            critic.network.requires_grad_(True)
            run.lap("generator")
            run.all_finish(record(rewards, scores, learned, made, run.lap.seconds, normaliser))
# fmt: on


def train(config: LasroConfig, **own) -> Path:
    """What the command does, by function -> the run folder; own: as in train.train."""
    config = go_on(with_names(config, **own))
    check_lasro(config, WORLD_SIZE)
    prompts, eval_prompts, reward, pipe = load(config, processes.start(config.tf32, config.deterministic), LASRO_PRESETS, **own)
    policy, one_step = (few_step_policy(pipe, steps, config) for steps in (config.num_steps, 1))
    torch.manual_seed(config.seed)  # of the surrogate's head, and of adapters
    critic = dataclasses.replace(policy.denoise, network=surrogate_of(pipe.unet, config.num_steps), guidance_scale=1.0)
    add_adapters(pipe, config.lora_rank) if config.lora_rank else pipe.unet.requires_grad_(True)
    for unet in (pipe.unet, critic.network) if config.gradient_checkpointing else ():
        unet.enable_gradient_checkpointing()
    trained = trained_parameters(pipe)
    groups = [{"params": list(trained.values())}, {"params": critic.network.parameters(), "lr": config.surrogate_learning_rate}]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay, fused=True)
    target = AveragedModel(pipe.unet, multi_avg_fn=get_ema_multi_avg_fn(config.target_decay)).requires_grad_(False)
    normaliser = Normaliser(config.num_steps, config.normaliser_decay)
    replay = Replay(config.replay_size, (config.images_per_prompt, config.num_steps, *policy.latent_shape))
    remembers = {"surrogate": critic.network, "target": target, "normaliser": normaliser, "replay": replay}
    run = Run(config, pipe, policy, trained, optimizer, remembers, eval_prompts, reward, {"eval_reward_one_step": one_step})
    anchor = load_anchor(config, pipe, target, prompts)
    run.tell(describe_lasro(config, prompts, count_truncated(pipe, prompts), trained, critic.network))
    with run.saved_when_stopped():
        finetune(config, run, pipe, policy, critic, anchor, normaliser, replay, optimizer, prompts, reward)
    return run.all_conclude(consistency_scheduler(pipe, config.num_steps))


def main(argv: list[str]) -> None:
    with one_line_errors(ValueError, OSError, RewardError, FloatingPointError):
        train(parse(argv, LasroConfig, LASRO_PRESETS, "lasro.py", "Finetuning by LaSRO."))


if __name__ == "__main__":
    processes.run_script(main)
