"""Steps against diffusers' schedulers, log-probs against torch.distributions, gradients against plain autograd."""

import itertools
import math

import pytest
import torch
from conftest import SD_V1_4_SCHEDULER, answering, make_pipeline, make_policy
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.distributions import Normal
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from miniature import build
from plumbing.pipeline import decode_latents, encode_prompts, sample_images
from plumbing.schedules import ddim_scheduler, noise_schedule
from rdp_loss import prdp_loss
from sampler import (
    Trajectories,
    backward_through_table,
    gaussian,
    gaussian_log_prob,
    log_prob_table,
    noise_generator,
    sample_trajectories,
)

PROMPTS = ["a small red circle on a blue background", "a white ring above a large black cross on a green background"]
SCHEDULES = [
    SD_V1_4_SCHEDULER | dict(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one, prediction_type=kind)
    for spacing, offset, to_one, kind in itertools.product(
        ("leading", "trailing"), (0, 1), (False, True), ("epsilon", "v_prediction")
    )
] + [SD_V1_4_SCHEDULER | dict(timestep_spacing="linspace", clip_sample=True), dict(build.flat_scheduler().config)]


def schedule_of(config, num_steps, eta=1.0):
    return noise_schedule(ddim_scheduler(config, num_steps), eta)


def trajectories(policy, pipe, images=3, batch_size=4, shared_x_T=False, prompts=PROMPTS, epoch=0) -> Trajectories:
    names = [(7, epoch, n, b) for n in range(len(prompts)) for b in range(images)]
    cond = encode_prompts(pipe, prompts)[torch.arange(len(prompts)).repeat_interleave(images)]
    return sample_trajectories(policy, cond, names, batch_size, shared_x_T=shared_x_T)


@pytest.mark.parametrize("num_steps", [3, 10, 50])
@pytest.mark.parametrize("config", SCHEDULES)
def test_every_step_equals_diffusers_ddim(config, num_steps):
    generator = torch.Generator().manual_seed(0)
    for eta in (0.3, 1.0):
        ours, theirs = schedule_of(config, num_steps, eta), DDIMScheduler.from_config(config)
        theirs.set_timesteps(num_steps)
        # diffusers ends a step at t - 1000 // T, and that is where its next one begins if T divides 1000, but for linspace.
        ends = [*theirs.timesteps.tolist()[1:], -1]
        meets = [t - 1000 // num_steps == end or end < 0 for t, end in zip(theirs.timesteps.tolist(), ends, strict=True)]
        assert all(meets) or config["timestep_spacing"] == "linspace" or 1000 % num_steps
        for i, t in enumerate(theirs.timesteps):
            if not meets[i]:
                continue
            output, x_t, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
            mu, sigma = gaussian(answering(ours, output), x_t, torch.tensor([i, i]), None)
            expected = theirs.step(output, t, x_t, eta=eta, variance_noise=noise).prev_sample
            torch.testing.assert_close(mu + sigma * noise, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_steps", [3, 10, 50])
@pytest.mark.parametrize("config", SCHEDULES)
def test_every_step_ends_at_the_noise_level_of_the_next(config, num_steps):
    """Of a single picture the exact network knows the noise e: x = alpha m + s e goes to alpha' m + (noise of variance s'^2)."""
    scheduler, m = ddim_scheduler(config | dict(clip_sample=False), num_steps), 0.7
    levels = [*scheduler.alphas_cumprod[scheduler.timesteps].double().tolist(), scheduler.final_alpha_cumprod.item()]
    for eta in (0.3, 1.0):
        schedule = noise_schedule(scheduler, eta)
        for i, (now, then) in enumerate(itertools.pairwise(levels)):
            e = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
            output = math.sqrt(now) * e - math.sqrt(1 - now) * m if config["prediction_type"] == "v_prediction" else e
            x_t = math.sqrt(now) * m + math.sqrt(1 - now) * e
            mu, sigma = gaussian(answering(schedule, output), x_t, torch.full((3,), i), None)
            left = mu - math.sqrt(then) * m
            torch.testing.assert_close(left[1], torch.zeros_like(left[1]), rtol=0, atol=1e-12)
            torch.testing.assert_close(left[2] ** 2 / 4 + sigma[2] ** 2, torch.full_like(left[2], 1 - then), rtol=0, atol=1e-12)
            assert sigma[2].item() == pytest.approx(
                eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then)), abs=1e-12
            )  # Eq. 16 of DDIM, of alpha_bar


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_eta_one_is_the_ddpm_posterior(spacing):
    config = SD_V1_4_SCHEDULER | dict(timestep_spacing=spacing)
    ours, theirs = schedule_of(config, 50), DDPMScheduler.from_config(config)
    theirs.set_timesteps(50)
    for i, t in enumerate(theirs.timesteps[:-1]):  # DDPMScheduler always ends at alpha_bar = 1
        output, x_t = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(int(t)))
        mu, sigma = gaussian(answering(ours, output), x_t, torch.tensor([i, i]), None)
        expected = theirs.step(output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(mu + sigma * noise, expected, rtol=1e-4, atol=1e-4)


def test_a_step_without_noise_is_left_out_of_the_table(pipe):
    for config in SCHEDULES:
        schedule = schedule_of(config, 5)
        steps = schedule.noisy.tolist()
        to_one = config.get("set_alpha_to_one", True)
        ends_at_timestep_0 = schedule.timesteps[-1] == 0
        noiseless = to_one or ends_at_timestep_0
        assert steps == list(range(4 if noiseless else 5)), config
    for to_one, columns in ((True, 4), (False, 5)):
        policy = make_policy(pipe, scheduler=dict(set_alpha_to_one=to_one))
        drawn = trajectories(policy, pipe)
        assert (
            drawn.latents.shape == (6, 6, 12, 8, 8) and drawn.log_probs.shape == (6, columns) and drawn.log_probs.isfinite().all()
        )
        torch.testing.assert_close(log_prob_table(policy, drawn, 5), drawn.log_probs, rtol=0, atol=1e-6)


def test_sd_v1_4_ends_with_the_published_sigma():
    assert schedule_of(SD_V1_4_SCHEDULER, 50).weights[2][-1].item() == pytest.approx(0.0206, abs=5e-5)


def step_weights(config, num_steps):
    """|d mu / d epsilon| / sigma of every noisy step, by autograd."""
    schedule, weights = schedule_of(dict(config) | dict(prediction_type="epsilon"), num_steps), []
    for i in schedule.noisy:
        epsilon = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        mu, sigma = gaussian(answering(schedule, epsilon), torch.zeros_like(epsilon), i.view(1), None)
        weights.append(abs(torch.autograd.grad(mu.sum(), epsilon)[0].item()) / sigma.item())
    return weights


def test_no_step_dominates_under_the_toy_schedule_as_one_does_under_sds():
    flat = step_weights(build.flat_scheduler().config, 5)
    span = build.LOG_SNR[0] - build.LOG_SNR[1]
    assert flat == pytest.approx([math.sqrt(math.exp(span / 5) - 1)] * 4, rel=0.01)  # SNR_{t-1} / SNR_t - 1
    for num_steps, peak in ((50, 3.3), (20, 5.4), (10, 8.3), (5, 13.9)):
        weights = step_weights(SD_V1_4_SCHEDULER, num_steps)
        assert weights[-2] == max(weights) == pytest.approx(peak, abs=0.06)


def test_log_prob_is_the_normal_density():
    generator = torch.Generator().manual_seed(0)
    x, mu = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    density = Normal(mu, sigma).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mu, sigma, "sum"), density)
    torch.testing.assert_close(gaussian_log_prob(x, mu, sigma, "mean") * 256, density)
    with pytest.raises(ValueError, match="mean, sum"):
        gaussian_log_prob(x, mu, sigma, "median")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_trajectories_equal_the_diffusers_pipeline(pipe, guidance_scale):
    """The same x_T and generators through StableDiffusionPipeline.__call__ with eta = 1 give the same x_0 and pictures."""
    policy = make_policy(pipe, guidance_scale=guidance_scale)
    names = [(7, 0, n, 0) for n in range(2)]
    latents = trajectories(policy, pipe, images=1).latents
    arguments = dict(num_inference_steps=5, guidance_scale=guidance_scale, eta=1.0)
    generators = [noise_generator(*name, stream=1) for name in names]
    x_0 = pipe(PROMPTS, latents=latents[:, 0], generator=generators, output_type="latent", **arguments).images
    torch.testing.assert_close(latents[:, -1], x_0, rtol=1e-4, atol=1e-4)
    generators = [noise_generator(*name, stream=1) for name in names]
    pictures = pipe(PROMPTS, latents=latents[:, 0], generator=generators, output_type="pt", **arguments).images
    torch.testing.assert_close(decode_latents(pipe, latents[:, -1]), pictures, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample_images(policy, pipe, PROMPTS, names, 1), pictures, rtol=1e-4, atol=1e-4)


def test_sdxl_trajectories_equal_its_pipeline(pipe):
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer), max_position_embeddings=20, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )  # fmt: skip
    xl = StableDiffusionXLPipeline(
        pipe.vae, CLIPTextModel(text), CLIPTextModelWithProjection(text), pipe.tokenizer, pipe.tokenizer, unet,
        pipe.scheduler, add_watermarker=False,
    )  # fmt: skip
    xl.set_progress_bar_config(disable=True)
    for part in (xl.unet, xl.text_encoder, xl.text_encoder_2):
        part.requires_grad_(False).eval()
    policy = make_policy(xl)
    latents = trajectories(policy, xl, images=1).latents
    generators = [noise_generator(7, 0, n, 0, stream=1) for n in range(2)]
    x_0 = xl(
        PROMPTS, latents=latents[:, 0], generator=generators, num_inference_steps=5, guidance_scale=3.0, eta=1.0,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents[:, -1], x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_trajectories_of_a_consistency_model_equal_its_pipeline(pipe, guidance_scale):
    """Such a UNet is told w; there is no second, unconditional pass."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{k: v for k, v in pipe.unet.config.items() if k[0] != "_"} | dict(time_cond_proj_dim=32))
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.3)
    lcm = LatentConsistencyModelPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, unet.requires_grad_(False).eval(),
        LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False), None, None, requires_safety_checker=False,
    )  # fmt: skip
    lcm.set_progress_bar_config(disable=True)
    policy = make_policy(lcm, 4, guidance_scale)
    latents = trajectories(policy, lcm, images=1).latents
    generators = [noise_generator(7, 0, n, 0, stream=1) for n in range(2)]
    x_0 = lcm(
        PROMPTS, latents=latents[:, 0], generator=generators, num_inference_steps=4, guidance_scale=guidance_scale,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents[:, -1], x_0, rtol=1e-4, atol=1e-4)


def test_noise_depends_on_the_name_of_the_trajectory_alone(pipe):
    policy = make_policy(pipe)
    whole = trajectories(policy, pipe, batch_size=6).latents
    for batch_size in (1, 4):
        parts = trajectories(policy, pipe, batch_size=batch_size).latents
        assert torch.equal(parts[:, 0], whole[:, 0])  # the noise itself: bit for bit
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)  # the network's sums: to rounding
    later = trajectories(policy, pipe, epoch=1).latents
    assert (later[:, 0] != whole[:, 0]).any(dim=(1, 2, 3)).all()
    assert len({tuple(row.flatten()[:3].tolist()) for row in whole[:, 0]}) == 6


def test_shared_x_T_is_shared_within_a_prompt_only(pipe):
    policy = make_policy(pipe)
    latents = trajectories(policy, pipe, shared_x_T=True).latents.view(2, 3, 6, -1)
    assert (latents[:, :, 0] == latents[:, :1, 0]).all()
    assert (latents[0, 0, 0] != latents[1, 0, 0]).any()
    assert (latents[:, 0, 1] != latents[:, 1, 1]).any()


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [None, SD_V1_4_SCHEDULER])
def test_recomputed_log_probs_equal_the_sampled_ones(pipe, guidance_scale, scheduler):
    policy = make_policy(pipe, guidance_scale=guidance_scale, scheduler=scheduler, num_steps=10)
    drawn = trajectories(policy, pipe, images=4, batch_size=8)
    for batch_size in (1, 7, 80):
        recomputed = log_prob_table(policy, drawn, batch_size)
        assert recomputed.dtype == torch.float64
        assert (recomputed - drawn.log_probs).abs().max() < 5e-6, batch_size  # the rounding of the UNet in fp32
    pipe.unet.conv_out.weight.data += 1e-3
    assert (log_prob_table(policy, drawn, 7) - drawn.log_probs).abs().amax(0).min() > 1e-5  # every step notices new weights


def test_autocast_keeps_log_probs_and_latents_precise(pipe):
    policy = make_policy(pipe, autocast="bf16")
    drawn = trajectories(policy, pipe)
    assert drawn.latents.dtype == torch.float32 and drawn.log_probs.dtype == torch.float64
    for column, i in enumerate(policy.schedule.noisy):  # of the first four, a batch when sampled: bf16 rounds otherwise in others
        with torch.no_grad():
            mu, sigma = gaussian(policy, drawn.latents[:4, i], i.expand(4), drawn.cond[:4])
        again = gaussian_log_prob(drawn.latents[:4, i + 1], mu, sigma, "mean")
        torch.testing.assert_close(again, drawn.log_probs[:4, column], rtol=0, atol=1e-5)
    exact = log_prob_table(make_policy(pipe), drawn, 6)
    assert 1e-6 < (exact - drawn.log_probs).abs().max() < 0.1  # bf16 did something


@pytest.fixture
def double():
    """fp64 policy with its weights, policies of theta_old and theta_ref near it, and trajectories of two prompts."""
    pipes = [make_pipeline() for _ in range(3)]
    for pipe in pipes:
        pipe.unet.double()
        pipe.text_encoder.double()
    policy, old, reference = (make_policy(pipe, guidance_scale=3.0) for pipe in pipes)
    drawn = trajectories(old, pipes[1], images=3)
    generator = torch.Generator().manual_seed(3)
    for pipe in (pipes[0], pipes[2]):
        for parameter in pipe.unet.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * parameter.abs().mean()
    weights = list(pipes[0].unet.requires_grad_(True).parameters())
    return policy, weights, old, reference, drawn


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_two_pass_gradient_equals_autograd_through_the_whole_loss(double, batch_size):
    policy, weights, old, reference, drawn = double
    rewards = torch.tensor([[0.1, 0.7, 0.4], [0.9, 0.2, 0.6]], dtype=torch.float64)
    tables = [log_prob_table(p, drawn, 8).view(2, 3, 4) for p in (policy, old, reference)]
    shift = (tables[0] - tables[1]).abs()
    eps = shift.median().item()  # half of the entries are clipped

    def loss_of(log_probs):
        return prdp_loss(log_probs, tables[1], tables[2], rewards, kl_weight=2.0, clip_range=eps)

    steps = []  # every step in one graph
    for i in policy.schedule.noisy:
        mu, sigma = gaussian(policy, drawn.latents[:, i], i.expand(6), drawn.cond)
        steps.append(Normal(mu, sigma).log_prob(drawn.latents[:, i + 1]).flatten(1).mean(1))
    whole = loss_of(torch.stack(steps, 1).view(2, 3, 4))
    expected = torch.autograd.grad(whole, weights)

    leaf = tables[0].clone().requires_grad_()
    loss = loss_of(leaf)
    (table_grad,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    skipped = (table_grad == 0).sum().item()
    assert 0 < skipped < table_grad.numel()  # clipping is active, and not everywhere
    recomputed = backward_through_table(policy, drawn, table_grad.flatten(0, 1), batch_size)
    for parameter, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10 * gradient.abs().max().item() + 1e-14)
    assert recomputed.isnan().sum().item() == skipped  # and entries without derivative cost no pass
    torch.testing.assert_close(recomputed.nan_to_num(), tables[0].flatten(0, 1) * (table_grad.flatten(0, 1) != 0))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(eta=-1.0), "eta must be at least 0"),
        (dict(eta=3.0), r"more noise than a step of this schedule leaves: use at most 1\.\d+"),
        (dict(num_steps=1001), "between 1 and 1000"),
        (dict(num_steps=0), "between 1 and 1000"),
        (dict(num_steps=1000), "last timestep 999"),  # leading spacing with offset 1 would ask for timestep 1000
        (dict(config=SD_V1_4_SCHEDULER | dict(thresholding=True)), "thresholding"),
    ],
)
def test_what_has_no_log_prob_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(**dict(config=SD_V1_4_SCHEDULER, num_steps=50, eta=1.0) | change)
