"""Steps against diffusers' schedulers, log-probs against torch.distributions, gradients against plain autograd."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from conftest import SD_V1_4_SCHEDULER, make_pipeline, make_policy
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch.distributions import Normal
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import toy_model
from pipeline import decode_latents, encode_prompts
from rdp_loss import prdp_loss
from sampler import (
    backward_through_table,
    ddim_gaussian,
    ddim_scheduler,
    gaussian_log_prob,
    log_prob_table,
    noisy_steps,
    sample_images,
    sample_trajectories,
    step_log_prob,
)

PROMPTS = ["a small red circle on a blue background", "a white ring above a large black cross on a green background"]
SCHEDULES = [
    SD_V1_4_SCHEDULER | dict(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one, prediction_type=kind)
    for spacing, offset, to_one, kind in itertools.product(
        ("leading", "trailing"), (0, 1), (False, True), ("epsilon", "v_prediction")
    )
] + [SD_V1_4_SCHEDULER | dict(timestep_spacing="linspace", clip_sample=True), dict(toy_model.flat_scheduler().config)]


def trajectories(policy, pipe, images=3, batch_size=4, shared_x_T=False, prompts=PROMPTS, epoch=0):
    names = [(7, epoch, n, b) for n in range(len(prompts)) for b in range(images)]
    cond = {k: v.repeat_interleave(images, 0) for k, v in encode_prompts(pipe, prompts).items()}
    batches = list(sample_trajectories(policy, cond, names, shared_x_T, batch_size))
    return torch.cat([b.latents for b in batches]), torch.cat([b.log_probs for b in batches]), cond


@pytest.mark.parametrize("num_steps", [3, 10, 50])
@pytest.mark.parametrize("config", SCHEDULES)
def test_every_step_equals_diffusers_ddim(config, num_steps):
    generator = torch.Generator().manual_seed(0)
    for eta in (0.3, 1.0):
        ours, theirs = ddim_scheduler(config, num_steps, eta), DDIMScheduler.from_config(config)
        theirs.set_timesteps(num_steps)
        for t in theirs.timesteps:
            output, x_t, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
            mu, sigma = ddim_gaussian(ours, output, x_t, t.expand(2), eta)
            expected = theirs.step(output, t, x_t, eta=eta, variance_noise=noise).prev_sample
            torch.testing.assert_close(mu + sigma * noise, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_eta_one_is_the_ddpm_posterior(spacing):
    config = SD_V1_4_SCHEDULER | dict(timestep_spacing=spacing)
    ours, theirs = ddim_scheduler(config, 50, 1.0), DDPMScheduler.from_config(config)
    theirs.set_timesteps(50)
    for t in theirs.timesteps[:-1]:  # DDPMScheduler always ends at alpha_bar = 1
        output, x_t = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(int(t)))
        mu, sigma = ddim_gaussian(ours, output, x_t, t.expand(2), 1.0)
        expected = theirs.step(output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(mu + sigma * noise, expected, rtol=1e-4, atol=1e-4)


def test_a_step_without_noise_is_left_out_of_the_table(pipe):
    for config in SCHEDULES:
        scheduler = ddim_scheduler(config, 5, 1.0)
        steps = noisy_steps(scheduler, 1.0).tolist()
        to_one = config.get("set_alpha_to_one", True)
        ends_at_timestep_0 = scheduler.timesteps[-1] == 0
        noiseless = to_one or ends_at_timestep_0
        assert steps == list(range(4 if noiseless else 5)), config
    for to_one, columns in ((True, 4), (False, 5)):
        policy = make_policy(pipe, scheduler=dict(set_alpha_to_one=to_one))
        latents, log_probs, cond = trajectories(policy, pipe)
        assert latents.shape == (6, 6, 4, 8, 8) and log_probs.shape == (6, columns) and log_probs.isfinite().all()
        torch.testing.assert_close(log_prob_table(policy, latents, cond, 5), log_probs, rtol=0, atol=1e-6)


def test_sd_v1_4_ends_with_the_published_sigma():
    scheduler = ddim_scheduler(SD_V1_4_SCHEDULER, 50, 1.0)
    _, sigma = ddim_gaussian(scheduler, *torch.zeros(2, 1, 4, 8, 8), scheduler.timesteps[-1:], 1.0)
    assert sigma.item() == pytest.approx(0.0206, abs=5e-5)


def step_weights(config, num_steps):
    """|d mu / d epsilon| / sigma of every noisy step, by autograd."""
    scheduler, weights = ddim_scheduler(dict(config) | dict(prediction_type="epsilon"), num_steps, 1.0), []
    for i in noisy_steps(scheduler, 1.0):
        epsilon = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        mu, sigma = ddim_gaussian(scheduler, epsilon, torch.zeros_like(epsilon), scheduler.timesteps[i].view(1), 1.0)
        weights.append(abs(torch.autograd.grad(mu.sum(), epsilon)[0].item()) / sigma.item())
    return weights


def test_no_step_dominates_under_the_toy_schedule_as_one_does_under_sds():
    flat = step_weights(toy_model.flat_scheduler().config, 5)
    span = toy_model.LOG_SNR[0] - toy_model.LOG_SNR[1]
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
    from sampler import noise_generator

    policy = make_policy(pipe, guidance_scale=guidance_scale)
    names = [(7, 0, n, 0) for n in range(2)]
    latents, _, _ = trajectories(policy, pipe, images=1)
    arguments = dict(num_inference_steps=5, guidance_scale=guidance_scale, eta=1.0)
    generators = [noise_generator(*name, stream=1) for name in names]
    x_0 = pipe(PROMPTS, latents=latents[:, 0], generator=generators, output_type="latent", **arguments).images
    torch.testing.assert_close(latents[:, -1], x_0, rtol=1e-4, atol=1e-4)
    generators = [noise_generator(*name, stream=1) for name in names]
    pictures = pipe(PROMPTS, latents=latents[:, 0], generator=generators, output_type="pt", **arguments).images
    torch.testing.assert_close(decode_latents(pipe, latents[:, -1]), pictures, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample_images(policy, pipe, PROMPTS, names, 1), pictures, rtol=1e-4, atol=1e-4)


def test_sdxl_trajectories_equal_its_pipeline(pipe):
    from sampler import noise_generator

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
    latents, _, _ = trajectories(policy, xl, images=1)
    generators = [noise_generator(7, 0, n, 0, stream=1) for n in range(2)]
    x_0 = xl(
        PROMPTS, latents=latents[:, 0], generator=generators, num_inference_steps=5, guidance_scale=3.0, eta=1.0,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents[:, -1], x_0, rtol=1e-4, atol=1e-4)


def test_noise_depends_on_the_name_of_the_trajectory_alone(pipe):
    policy = make_policy(pipe)
    whole, _, _ = trajectories(policy, pipe, batch_size=6)
    for batch_size in (1, 4):
        parts, _, _ = trajectories(policy, pipe, batch_size=batch_size)
        assert torch.equal(parts[:, 0], whole[:, 0])  # the noise itself: bit for bit
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)  # the network's sums: to rounding
    later, _, _ = trajectories(policy, pipe, epoch=1)
    assert (later[:, 0] != whole[:, 0]).any(dim=(1, 2, 3)).all()
    assert len({tuple(row.flatten()[:3].tolist()) for row in whole[:, 0]}) == 6


def test_shared_x_T_is_shared_within_a_prompt_only(pipe):
    policy = make_policy(pipe)
    latents, _, _ = trajectories(policy, pipe, shared_x_T=True)
    latents = latents.view(2, 3, 6, -1)
    assert (latents[:, :, 0] == latents[:, :1, 0]).all()
    assert (latents[0, 0, 0] != latents[1, 0, 0]).any()
    assert (latents[:, 0, 1] != latents[:, 1, 1]).any()


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [None, SD_V1_4_SCHEDULER])
def test_recomputed_log_probs_equal_the_sampled_ones(pipe, guidance_scale, scheduler):
    policy = make_policy(pipe, guidance_scale=guidance_scale, scheduler=scheduler, num_steps=10)
    latents, sampled, cond = trajectories(policy, pipe, images=4, batch_size=8)
    for batch_size in (1, 7, 80):
        recomputed = log_prob_table(policy, latents, cond, batch_size)
        assert recomputed.dtype == torch.float64
        assert (recomputed - sampled).abs().max() < 5e-6, batch_size  # the rounding of the UNet in fp32
    policy.unet.conv_out.weight.data += 1e-3
    assert (log_prob_table(policy, latents, cond, 7) - sampled).abs().amax(0).min() > 1e-5  # every step notices new weights


def test_autocast_keeps_log_probs_and_latents_precise(pipe):
    policy = make_policy(pipe, autocast=torch.bfloat16)
    latents, sampled, cond = trajectories(policy, pipe)
    assert latents.dtype == torch.float32 and sampled.dtype == torch.float64
    batch = {k: v[:4] for k, v in cond.items()}  # the first that was sampled: bf16 rounds otherwise in other batches
    for column, i in enumerate(noisy_steps(policy.scheduler, 1.0)):
        x_t, t = latents[:4, i], policy.scheduler.timesteps[i].expand(4)
        with torch.no_grad():
            again = step_log_prob(policy, x_t, latents[:4, i + 1], t, batch)
        torch.testing.assert_close(again, sampled[:4, column], rtol=0, atol=1e-5)
    exact = log_prob_table(dataclasses.replace(policy, autocast=None), latents, cond, 6)
    assert 1e-6 < (exact - sampled).abs().max() < 0.1  # bf16 did something


@pytest.fixture
def double():
    """fp64 policy, reference and trajectories of two prompts, with theta_old and theta_ref near theta."""
    pipe = make_pipeline()
    pipe.unet.double()
    pipe.text_encoder.double()
    policy = make_policy(pipe, guidance_scale=3.0)
    reference, old = (dataclasses.replace(policy, unet=copy.deepcopy(policy.unet)) for _ in range(2))
    latents, _, cond = trajectories(old, pipe, images=3)
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.unet.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * parameter.abs().mean()
    for parameter in reference.unet.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * parameter.abs().mean()
    policy.unet.requires_grad_(True)
    return policy, reference, old, latents, cond


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_two_pass_gradient_equals_autograd_through_the_whole_loss(double, batch_size):
    policy, reference, old, latents, cond = double
    rewards = torch.tensor([[0.1, 0.7, 0.4], [0.9, 0.2, 0.6]], dtype=torch.float64)
    tables = [log_prob_table(p, latents, cond, 8).view(2, 3, 4) for p in (policy, old, reference)]
    shift = (tables[0] - tables[1]).abs()
    eps = shift.median().item()  # half of the entries are clipped

    def loss_of(log_probs):
        return prdp_loss(log_probs, tables[1], tables[2], rewards, kl_weight=2.0, clip_range=eps)

    steps = []  # every step in one graph
    for i, t in enumerate(policy.scheduler.timesteps[:4]):  # the fifth has no noise
        steps.append(step_log_prob(policy, latents[:, i], latents[:, i + 1], t.expand(6), cond))
    whole = loss_of(torch.stack(steps, 1).view(2, 3, 4))
    expected = torch.autograd.grad(whole, list(policy.unet.parameters()))

    leaf = tables[0].clone().requires_grad_()
    loss = loss_of(leaf)
    (table_grad,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    skipped = (table_grad == 0).sum().item()
    assert 0 < skipped < table_grad.numel()  # clipping is active, and not everywhere
    recomputed = backward_through_table(policy, latents, cond, table_grad.flatten(0, 1), batch_size)
    for parameter, gradient in zip(policy.unet.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10 * gradient.abs().max().item() + 1e-14)
    assert recomputed.isnan().sum().item() == skipped  # and entries without derivative cost no pass
    torch.testing.assert_close(recomputed.nan_to_num(), tables[0].flatten(0, 1) * (table_grad.flatten(0, 1) != 0))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(eta=0.0), "deterministic step has no log-prob"),
        (dict(eta=-1.0), "eta must be > 0"),
        (dict(num_steps=1001), "between 1 and 1000"),
        (dict(num_steps=0), "between 1 and 1000"),
        (dict(num_steps=1000), "last timestep 999"),  # leading spacing with offset 1 would ask for timestep 1000
        (dict(config=SD_V1_4_SCHEDULER | dict(thresholding=True)), "thresholding"),
        (dict(config=SD_V1_4_SCHEDULER | dict(set_alpha_to_one=True), num_steps=1), "no step of this scheduler has noise"),
    ],
)
def test_what_has_no_log_prob_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ddim_scheduler(**dict(config=SD_V1_4_SCHEDULER, num_steps=50, eta=1.0) | change)
