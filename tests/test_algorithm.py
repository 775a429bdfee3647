"""The composition: algorithm_1() against the paper's as a naive loop, one graph through everything, in fp64 with plain SGD."""

import copy
import functools

import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.distributions import Normal

import train
from plumbing.flags import parse
from plumbing.pipeline import pipeline_policy
from plumbing.prompts import draw_prompts
from plumbing.run import Run
from plumbing.trainable import make_trainable, trained_parameters
from sampler import noise_generator

PROMPTS = ["a red circle on a blue background", "a large white ring on a black background", "a green cross on a red background"]
EPOCHS, K, N, B, T, W = 2, 2, 2, 3, 4, 3.0
BETA, EPS, LR, MAX_NORM = 2e-3, 2e-3, 2e-3, 1.0
FLAGS = (
    f"--preset toy --epochs {EPOCHS} --updates_per_epoch {K} --prompts_per_epoch {N} --images_per_prompt {B} --num_steps {T} "
    f"--guidance_scale {W} --kl_weight {BETA} --clip_range {EPS} --max_grad_norm {MAX_NORM} --eval_prompts= --seed 5 "
    "--sample_batch_size 4 --log_prob_batch_size 5 --train_batch_size 3"
).split()


def redness(images, prompts):
    """A reward that tells every picture from every other, in steps so large that the rounding of fp32 pictures is not seen."""
    return (images[:, 0].mean((1, 2)) * 1e4).round() / 1e4


def naive(pipe) -> dict[str, torch.Tensor]:
    """Algorithm 1 line by line, by diffusers' and torch's own functions -> the trained weights."""
    unet, reference = pipe.unet.requires_grad_(True), copy.deepcopy(pipe.unet).requires_grad_(False)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double()
    )  # fmt: skip
    scheduler.set_timesteps(T)

    @functools.cache
    def text(prompt):
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt")
        return pipe.text_encoder(ids.input_ids)[0].detach()

    def gaussian(network, x_t, t, prompt):
        """Mean and standard deviation of x_{t-1}: what diffusers' step gives for no noise, and what noise of one adds to it."""
        pair = network(torch.cat([x_t, x_t]), t, torch.cat([text(prompt), text("")])).sample
        conditional, unconditional = pair.chunk(2)
        output = unconditional + W * (conditional - unconditional)
        mu = scheduler.step(output, t, x_t, eta=1.0, variance_noise=torch.zeros_like(x_t)).prev_sample
        return mu, (scheduler.step(output, t, x_t, eta=1.0, variance_noise=torch.ones_like(x_t)).prev_sample - mu).detach()

    def log_probs(network, trajectory, prompt):
        """(T - 1,) means over latent dimensions; the last step of the miniature's schedule has no noise and is left out."""
        rows = []
        for i, t in enumerate(scheduler.timesteps[:-1]):
            mu, sigma = gaussian(network, trajectory[i], t, prompt)
            rows.append(Normal(mu, sigma).log_prob(trajectory[i + 1]).mean())
        return torch.stack(rows)

    for epoch in range(EPOCHS):
        old = copy.deepcopy(unet).requires_grad_(False)
        groups = []
        for n, prompt in enumerate(draw_prompts(PROMPTS, N, epoch, 5)):
            group = []
            for b in range(B):
                first, later = (noise_generator(5, epoch, n, b, stream) for stream in (0, 1))
                trajectory = [randn_tensor((1, 12, 8, 8), first, dtype=torch.float64)]
                with torch.no_grad():
                    for i, t in enumerate(scheduler.timesteps):
                        mu, sigma = gaussian(old, trajectory[-1], t, prompt)
                        noise = randn_tensor(mu.shape, later, dtype=torch.float64) if i < T - 1 else 0
                        trajectory.append(mu + sigma * noise)
                    pixels = pipe.vae.decode(trajectory[-1].float() / pipe.vae.config.scaling_factor).sample
                    reward = redness((pixels / 2 + 0.5).clamp(0, 1), [prompt]).item()
                    lp_old, lp_ref = (log_probs(network, trajectory, prompt) for network in (old, reference))
                group.append((trajectory, reward, lp_old, lp_ref))
            groups.append((prompt, group))
        for k in range(K):
            per_prompt, clipped = [], []
            for prompt, group in groups:
                rhat, rhat_clip = [], []
                for trajectory, _, lp_old, lp_ref in group:
                    lp = log_probs(unet, trajectory, prompt)
                    rhat.append((lp - lp_ref).mean())
                    rhat_clip.append(((lp - lp_ref).clamp(lp_old - lp_ref - EPS, lp_old - lp_ref + EPS)).mean())
                    clipped += ((lp - lp_old).abs() > EPS).tolist()
                errors = []
                for i in range(B):
                    for j in range(B):
                        if group[i][1] > group[j][1]:
                            target = (group[i][1] - group[j][1]) / BETA
                            pair = [(r[i] - r[j] - target) ** 2 for r in (rhat, rhat_clip)]
                            errors.append(torch.maximum(*pair))
                assert errors, "all rewards of a prompt are equal"
                per_prompt.append(torch.stack(errors).mean())
            assert 0 < sum(clipped) < len(clipped) if k else not any(clipped)
            gradients = torch.autograd.grad(torch.stack(per_prompt).mean(), list(unet.parameters()), allow_unused=True)
            norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
            with torch.no_grad():
                for parameter, gradient in zip(unet.parameters(), gradients, strict=True):
                    if gradient is not None:
                        parameter -= LR * gradient * min(1.0, MAX_NORM / (norm + 1e-6))
    return {name: parameter.detach() for name, parameter in unet.named_parameters()}


def double_pipeline():
    pipe = make_pipeline(channels=(8, 16))
    torch.nn.init.constant_(pipe.vae.decoder.layers[-1].bias, 0.5)  # pictures around grey; without it all red is clipped away
    pipe.unet.double()
    pipe.text_encoder.double()
    return pipe


def test_train_is_algorithm_1(tmp_path):
    expected = naive(double_pipeline())
    config, pipe = parse([*FLAGS, "--output_dir", str(tmp_path)]), double_pipeline()
    policy = pipeline_policy(pipe, T, guidance_scale=W, eta=1.0)
    start = {name: parameter.clone() for name, parameter in pipe.unet.named_parameters()}
    reference = make_trainable(pipe, config)
    trained = trained_parameters(pipe)
    optimizer = torch.optim.SGD(trained.values(), LR)
    run = Run(config, pipe, policy, trained, optimizer, {}, [], redness)
    train.algorithm_1(config, run, pipe, policy, reference, optimizer, PROMPTS, redness, None)
    for name, parameter in pipe.unet.named_parameters():
        moved = (expected[name] - start[name]).abs().max().item()
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6 * moved + 1e-12, msg=name)
    assert any(not torch.equal(parameter, start[name]) for name, parameter in pipe.unet.named_parameters())
