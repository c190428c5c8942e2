# SPDX-License-Identifier: MIT
# ruff: noqa: E501
"""Mutation test: changes one token of the code at a time and runs the tests, which must fail.

    python benchmarks/mutate.py [FIRST [LAST]]          # results/mutations.txt is what it printed
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
# file, the code, what becomes of it
MUTATIONS = [
    ('ddpm.py', 'torch.linspace(beta_start, beta_end, T', 'torch.linspace(beta_end, beta_start, T'),
    ('ddpm.py', '(1 - betas).cumprod(0)', '(1 - betas).cumsum(0)'),
    ('ddpm.py', 'torch.where(t < 0, 1.0, acp', 'torch.where(t < 0, 0.99, acp'),
    ('ddpm.py', 'return a.sqrt() * x + (1 - a).sqrt() * eps', 'return a.sqrt() * x + (1 - a) * eps'),
    ('ddpm.py', 'return a.sqrt() * x + (1 - a)', 'return a * x + (1 - a)'),
    ('ddpm.py', 'acp), t).float() - eps).square()', 'acp), t).float() - x).square()'),
    ('ddpm.py', '(x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()', '(x_t - (1 - a).sqrt() * eps_hat) / a'),
    ('ddpm.py', '(x_t - (1 - a).sqrt() * eps_hat)', '(x_t + (1 - a).sqrt() * eps_hat)'),
    ('ddpm.py', 'x0_hat.clamp(-1, 1) if clip', 'x0_hat.clamp(-1, 1) if not clip'),
    ('ddpm.py', '(steps - k) / steps) - 1', '(steps - k) / steps)'),
    ('ddpm.py', 'round((t_start + 1) *', 'round(t_start *'),
    ('ddpm.py', 't_start, device=x.device)', 't_start - 1, device=x.device)'),
    ('ddpm.py', 'times[1:] + [-1]', 'times[1:] + [0]'),
    ('ddpm.py', 'eps_hat = (x_t - a_t.sqrt()', 'eps_hat = (x_t - a_s.sqrt()'),
    ('ddpm.py', 'x0_hat) / (1 - a_t).sqrt()', 'x0_hat) / (1 - a_t)'),
    ('ddpm.py', '(1 - a_t / a_s) * (1 - a_s) / (1 - a_t)).sqrt()', '(1 - a_t / a_s) * (1 - a_s) / (1 - a_t))'),
    ('ddpm.py', '(1 - a_t / a_s) * (1 - a_s)', '(1 - a_s / a_t) * (1 - a_s)'),
    ('ddpm.py', 'std = eta * ', 'std = '),
    ('ddpm.py', '(1 - a_s - std.square())', '(1 - a_s + std.square())'),
    ('ddpm.py', 'a_s.sqrt() * x0_hat + (1', 'a_t.sqrt() * x0_hat + (1'),
    ('ddpm.py', 'if eta > 0 and then >= 0:', 'if eta > 0:'),
    ('ddpm.py', 'x_t + std * noise_like', 'x_t - 2 * std * noise_like'),
    ('ddpm.py', 'denoiser(x + sigma * noise_like', 'denoiser(x + noise_like'),
    ('ddpm.py', 'generator)).float() - x).square()', 'generator)).float() - x).abs()'),
    ('ddpm.py', 'p.lerp_(q, 1 - decay)', 'p.lerp_(q, decay)'),
    ('metrics.py', '(x_hat.float() - x.float()).square()', '(x_hat.float() + x.float()).square()'),
    ('metrics.py', 'data_range ** 2 / mse', 'data_range / mse'),
    ('metrics.py', '10 * torch.log10', '20 * torch.log10'),
    ('metrics.py', '(error.flatten(1) * m).sum(1) / m.sum(1)', '(error.flatten(1) * m).mean(1)'),
    ('metrics.py', '(2 * sigma ** 2)', '(sigma ** 2)'),
    ('metrics.py', '0.01 * data_range', '0.02 * data_range'),
    ('metrics.py', '0.03 * data_range', '0.03'),
    ('metrics.py', 'product - mu_a * mu_b', 'product'),
    ('metrics.py', 'squares - mu_a * mu_a - mu_b', 'squares - mu_a * mu_a + mu_b'),
    ('metrics.py', 'mu_a, mu_b = mu_a + m_a, mu_b + m_b', 'mu_a, mu_b = mu_a, mu_b + m_b'),
    ('metrics.py', '- 2 * root)', '- root)'),
    ('metrics.py', 'math.sqrt(len(f) - 1)', 'math.sqrt(len(f))'),
    ('metrics.py', '(a.mean(0) - b.mean(0)).square()', '(a.mean(0) - b.mean(0)).abs()'),
    ('metrics.py', 'f - f.mean(0)) /', 'f) /'),
    ('metrics.py', '(r.sum() - r.diagonal().sum())', '(r.sum())'),
    ('metrics.py', 'v = v - v.mean(1, keepdim=True)', 'v = v - v.mean(0, keepdim=True)'),
    ('metrics.py', '.sum(1, keepdim=True).sqrt() + 1e-10', '.sum(1, keepdim=True) + 1e-10'),
    ('metrics.py', 'if k in (3, 6):', 'if k in (3, 8):'),
    ('metrics.py', '(a - b).square(), w)', '(a - b).abs(), w)'),
    ('sud2.py', 'math.log(120) + 1.1', 'math.log(60) + 1.1'),
    ('sud2.py', 'math.log(120) + 1.1', 'math.log(120) + 2.2'),
    ('sud2.py', 'return (x - x_hat).square().mean()', 'return (x - x_hat).abs().mean()'),
    ('sud2.py', '(x_hat - label.detach()).square()', '(x_hat - label).square()'),
    ('sud2.py', 'return metrics.correlation(z, form)', 'return -metrics.correlation(z, form)'),
    ('sud2.py', 'paired + lam1 * denoiser + lam2 * reg', 'paired + lam2 * denoiser + lam1 * reg'),
    ('sud2.py', 'nu = a.sigma * ddpm', 'nu = a.sigma ** 2 * ddpm'),
    ('sud2.py', "if kind == 'noise, denoise' else 0", "if kind != 'noise, denoise' else 0"),
    ('sud2.py', 'models.denoiser(x_hat + nu)', 'models.denoiser(x_hat - nu)'),
    ('sud2.py', 'return x_hat - (D_f - D_x)', 'return x_hat + (D_f - D_x)'),
    ('sud2.py', 'return x_hat - (D_f - D_x)', 'return x_hat - D_f'),
    ('sud2.py', '(eps_f - eps).square().mean()', '(eps_f - x_t).square().mean()'),
    ('sud2.py', 'torch.lerp(x, cover, torch.sigmoid(4', 'torch.lerp(cover, x, torch.sigmoid(4'),
    ('sud2.py', 'sigmoid(4 * share - 2)', 'sigmoid(4 * share + 2)'),
    ('sud2.py', '(y - x).flatten(2).median', '(x - y).flatten(2).median'),
    ('sud2.py', 'torch.cat([x, c.expand_as(x)], 1)', 'torch.cat([x, 0 * c.expand_as(x)], 1)'),
    ('sud2.py', 'paired_loss(y_hat[1], y_u)', 'paired_loss(y_hat[1], x_hat)'),
    ('sud2.py', 'paired_loss(y_hat[0], y) +', 'paired_loss(y_hat[0], x) +'),
    ('sud2.py', 'made += y_u - y_hat[1]', 'made += y_hat[1] - y_u'),
    ('sud2.py', 'measured(self.g, x_u, c[len(x):])', 'measured(self.g, x_u, c[:-len(x)])'),
    ('sud2.py', 'paired_loss(self.f(made), x_u)', 'paired_loss(self.f(x_u), made)'),
    ('sud2.py', 'return paired_loss(self.f(x_u), x_u)', 'return paired_loss(self.f(y_u), x_u)'),
    ('sud2.py', 'loss + lam3 *', 'loss + lam2 *'),
    ('sud2.py', "'sud2-kl+g': Method('entropy', times=5, clean='g(x_u)')", "'sud2-kl+g': Method('entropy', times=5)"),
    ('sud2.py', "    'sud2': Method('R∘F', reg=True)", "    'sud2': Method('R∘F')"),
    ('sud2.py', 'any(weights) and step >=', 'any(weights) or step >='),
    ('sud2.py', 'a.lam3 if m.clean else 0)', '0)'),
    ('sud2.py', 'small.round().byte()', 'small.byte()'),
    ('sud2.py', 'if len(x) > 1:  ', 'if len(x) > 0:  '),
    ('sud2.py', 'min(1 - 1 / (step + 1), .999)', 'min(1 / (step + 1), .999)'),
    ('sud2.py', 'torch.lerp(x_hat.float(), self.Z[index], self.alpha)',
     'torch.lerp(self.Z[index], x_hat.float(), self.alpha)'),
    ('sud2.py', '(1 - self.alpha ** self.visits[index])', '(1 - self.alpha)'),
    ('sud2.py', 'math.exp(-5 * (1 - min', 'math.exp(5 * (1 - min'),
    ('sud2.py', "(s['psnr'] - low) / (high - low)", "(s['psnr'] - low) / high"),
    ('sud2.py', 'x.flip(-1), x)', 'x.flip(-2), x)'),
    ('sud2.py', 'a.shift, g).chunk(2, 1)', 'a.shift, g).chunk(2, 1)[::-1]'),
    ('unet.py', 'beta=-4.7750, alpha=2.0315', 'beta=4.7750, alpha=2.0315'),
    ('unet.py', 'a = q @ a @ q', 'a = q @ a'),
    ('unet.py', 'averaged[k] for k in', 'averaged[k].transpose(0, 1).reshape(shape) for k in'),
    ('unet.py', "(3 * self.param_groups[1]['lr'])", "(-3 * self.param_groups[1]['lr'])"),
    ('unet.py', "n.startswith(('stem', 'head'))", "n.startswith('stem')"),
    ('unet.py', 'p.grad = None   ', 'p.grad = p.grad'),
    ('unet.py', 'up.weight[:, :, :1, :1].expand_as(up.weight)', 'up.weight'),
    ('unet.py', 'p[::patch ** 2].repeat_interleave(patch ** 2, 0)', 'p'),
    ('cyclegan.py', 'cycle * (l1_loss(gan.to_y(fake_x), y)', 'cycle * (l1_loss(gan.to_y(fake_x), x)'),
    ('cyclegan.py', 'identity * (l1_loss(gan.to_x(x), x)', 'identity * (l1_loss(gan.to_x(y), x)'),
    ('cyclegan.py', 'gan_loss(gan.real_x(fake_x), True)', 'gan_loss(gan.real_x(fake_x), False)'),
    ('cyclegan.py', 'return .5 * (gan_loss(net(real), True)', 'return (gan_loss(net(real), True)'),
    ('cyclegan.py', 'torch.where(full & swap, old, image))', 'torch.where(swap, old, image))'),
    ('cyclegan.py', 'torch.where(full & ~swap, old, image)', 'torch.where(full, old, image)'),
    ('data.py', 'torch.where(hole, 128, x)', 'torch.where(hole, x, 128)'),
    ('data.py', 'x * t + airlight * (1 - t)', 'x * t + airlight'),
    ('data.py', 'degraded(validation or test, 2 if validation', 'degraded(validation or test, 0 if validation'),
    ('data.py', 'y[:pairs], y[pairs:], x[pairs:], images', 'y[:pairs], y, x, images'),
    ('data.py', "h.stem.split('_')[0] == name", "h.stem.split('_')[0] != name"),
    ('data.py', '[u[:, i:i + size, j:j + size]', '[u[:, i:i + size, i:i + size]'),
    ('data.py', '*crops(load(many), size, rng)[::-1]', '*crops(load(many), size, rng)'),
    ('data.py', 'else (x, other, None)', 'else (other, x, None)'),
    ('data.py', '.299 * r + .587 * g', '.587 * r + .299 * g'),
    ('data.py', '(image.width - side) // 2', '(image.width - side)'),
    ('data.py', 'str(index // 2000)', 'str(index // 3000)'),
    ('sud2.py', 'data_range=2, mask=m)', 'data_range=1, mask=m)'),
    ('sud2.py', "{'hole': hole, 'visible': ~hole}", "{'hole': ~hole, 'visible': hole}"),
    ('sud2.py', 'prior, x, t=50, batch', 'prior, x, t=60, batch'),
    ('unet.py', 'x + torch.sigmoid(4 * share) * change', 'torch.sigmoid(4 * share) * change'),
    ('unet.py', 'torch.sigmoid(4 * share) * change', '(4 * share) * change'),
    ('sud2.py', 'if m.label in ENDLESS', 'if m.label not in ENDLESS'),
    ('sud2.py', 'else self.numbers.copy_(now)', 'else now'),
    ('sud2.py', '(.2 if replays(run.device) else 1.4)', '(1.4 if replays(run.device) else .2)'),
    ('sud2.py', 'if self.calls <= 3:', 'if self.calls <= 4:'),
    ('sud2.py', 'min(1, 400 / a.updates)', 'min(1, a.updates / 400)'),
    ('sud2.py', "'entropy': 4 * t_prior", "'entropy': 5 * t_prior"),
    ('sud2.py', 'if seed == a.seed[0]:', 'if seed != a.seed[0]:'),
    ('sud2.py', "seconds + now - began, 'parts'", "now - began, 'parts'"),
    ('sud2.py', 'if cls.asked or not cls.waiting', 'if not cls.waiting'),
    ('sud2.py', 'box[3] - (y - ys[0])', 'box[3] - (y + ys[0])'),
    ('sud2.py', '4 + r * (side + 4)))', '5 + r * (side + 4)))'),
    ('sud2.py', 'grey=a.channels == 1', 'grey=a.channels == 2'),
    ('sud2.py', 'if seed != a.seed[0]:', 'if seed == a.seed[0]:'),
    ('sud2.py', 'rows[:, None] * cols', 'rows[:, None] / cols'),
    ('sud2.py', '(now - last_line), numbers', '(now - began), numbers'),
    ('sud2.py', 'torch.distributed.all_gather_object(flags, flag)', 'pass'),
    ('sud2.py', "4 + r * (side + 4) + side / 2), name", "4 + r * (side - 4) + side / 2), name"),
    ('data.py', 'take(clean - len(more), views=1)', 'take(clean - len(more), views=2)'),
    ('data.py', 'max(1, of_all //', 'max(2, of_all //'),
    ('data.py', 'default_rng(0).permutation(len(scenes))', 'default_rng(1).permutation(len(scenes))'),
    ('data.py', 'if not folder.is_dir() or not', 'if not folder.is_dir() and not'),
    ('cyclegan.py', 'images.detach().float(), generator', 'images.detach(), generator'),
    ('data.py', 'images, _ = pictures(clean, size, 0)', '_, images = pictures(clean, size, 0)'),
    ('data.py', 'images, _ = pictures(clean, size, 0)', 'images, _ = pictures(clean, size, 1)'),
    ('data.py', 'default_rng(0).permutation(numbers)', 'default_rng(1).permutation(numbers)'),
    ('sud2.py', 'run.out.mkdir(parents=True, exist_ok=True)', 'pass'),
    ('sud2.py', "elif a.task == 'dehaze':", "elif a.task != 'dehaze':"),
    ('sud2.py', 'if len(x) > 1:   ', 'if len(x) > 2:   '),
    ('data.py', 'names.setdefault(name, f) != f', 'names.setdefault(name, f) is None'),
    ('sud2.py', 'math.ceil(96 / size)', '96 // size'),
    ('sud2.py', 'step + 2 - a.average_from', 'step + 1 - a.average_from'),
    ('sud2.py', 'ema_update(mean, f, keeps)', 'ema_update(mean, f, decay)'),
    ('sud2.py', 'ema_update(f, mean, .97)', 'ema_update(f, mean, .03)'),
    ('sud2.py', 'ddpm.ema_update(f, mean, .97)', 'pass'),
    ('sud2.py', "n > 0 and m.clean != 'g(x_u)'", "n > 0 and m.clean == 'g(x_u)'"),
    ('sud2.py', "{'f': f, 'mean': mean, 'opt'", "{'f': f, 'opt'"),
    ('sud2.py', '100 * len(images)', '200 * len(images)'),
    ('sud2.py', '100 * len(images)', '80 * len(images)'),
    ('sud2.py', '250 * n // batch', '300 * n // batch'),
    ('sud2.py', 'run.a.shift if few else 0', 'run.a.shift'),
    ('sud2.py', 'run.a.shift if few else 0', '0'),
    ('sud2.py', 'x_u = clean_batch(run, images, self.draws, max(1, run.a.batch // 4))',
     'x_u = batch_of(images, *draw_batch(self.draws, len(images), run.a.batch // 4))'),
    ('sud2.py', 'x_u = Group.own(clean_batch(run, images, self.draws, run.a.batch))',
     'x_u = Group.own(batch_of(images, *draw_batch(self.draws, len(images), run.a.batch)))'),
    ('sud2.py', '2 ** 16 // run.a.size', '2 ** 18 // run.a.size'),
    ('sud2.py', 'if several else u)', 'if not several else u)'),
    ('sud2.py', 'asked, waiting = False, False', 'asked, waiting = False, True'),
    ('sud2.py', "map_location='cpu').eval()", "map_location='cpu')"),
    ('sud2.py', 'place = math.log if log', 'place = float if log'),
    ('sud2.py', 'min(50, steps / 8)', '50'),
    ('data.py', 'if min(image.size) < size:', 'if min(image.size) <= size:'),
    ('cyclegan.py', 'channels, width, 4, stride=2, padding=1)', 'channels, width, 4, stride=2, padding=2)'),
    ('cyclegan.py', 'p.requires_grad_(False)', 'pass'),
    ('cyclegan.py', '{k: v.detach() for', '{k: v for'),
    ('cyclegan.py', "{'discriminator': loss.detach()}", "{'discriminator': loss}"),
    ('ddpm.py', '@torch.no_grad()\ndef R(', 'def R('),
    ('sud2.py', 'x_hat = x_hat.detach()', 'pass'),
    ('sud2.py', 'self.start(x_hat.detach(), y_u', 'self.start(x_hat, y_u'),
    ('sud2.py', 'y, x_hat.detach(), y_u)', 'y, x_hat, y_u)'),
    ('sud2.py', 'copy.deepcopy(f).requires_grad_(False)', 'copy.deepcopy(f)'),
    ('sud2.py', 'copy.deepcopy(net).requires_grad_(False)', 'copy.deepcopy(net)'),
    ('sud2.py', '{k: v.detach() for', '{k: v for'),
    ('sud2.py', "{'loss': loss.detach()}", "{'loss': loss}"),
    ('sud2.py', "no_grad():\n        if kind == 'CycleGAN'", "enable_grad():\n        if kind == 'CycleGAN'"),
    ('sud2.py', 'no_grad():\n        D_f', 'enable_grad():\n        D_f'),
    ('sud2.py', 'no_grad():\n                made', 'enable_grad():\n                made'),
    ('sud2.py', 'no_grad(), run.amp():\n            losses', 'enable_grad(), run.amp():\n            losses'),
    ('sud2.py', 'no_grad(), run.amp():\n            out', 'enable_grad(), run.amp():\n            out'),
    ('sud2.py', 'small.round().byte()', 'small.round()'),
    ('sud2.py', 'run.out.mkdir(parents=True', 'run.out.mkdir(parents=False'),
    ('cyclegan.py', '(verdict.float() - ', '(verdict - '),
    ('data.py', 'j:j + size].clone()', 'j:j + size]'),
    ('data.py', 'part.unlink()', 'pass'),
    ('sud2.py', 'min(c[key], 100)', 'c[key]'),
    ('sud2.py', 'sizes[2]) * t_prior', 'sizes[2]) * t_f'),
    ('sud2.py', 'data.to_float(x[k][None] if several else x)', '(x[k][None] if several else x).float()'),
    ('sud2.py', "self.ensemble = self.parts['ensemble'] = ", 'self.ensemble = '),
    ('sud2.py', "{'fake': self.fake, 'fake_opt': self.fake_opt}", "{'fake': self.fake}"),
    ('sud2.py', 'n > 0 and', 'n > 1 and'),
    ('unet.py', '.add_(skips[i])', ''),
    ('metrics.py', 'range(0, H - 10, TILE - 10)', 'range(0, H - 10, TILE)'),
    ('metrics.py', 'slice(j, j + TILE)', 'slice(j, j + TILE - 1)'),
    ('metrics.py', 'x.shape[1] * (H - 10)', 'x.shape[1] * H'),
    ('sud2.py', '(n - side) // 2 for n in u', '(n - side) // 3 for n in u'),
]
OF_SEVERAL_PROCESSES = [
    ('sud2.py', '+ cls.world * (x - x.detach())', '+ (x - x.detach())'),
    ('sud2.py', 'part.view_as(g) / cls.world', 'part.view_as(g)'),
    ('sud2.py', 'torch.stack(parts, 1).flatten(0, 1)', 'torch.cat(parts)'),
    ('sud2.py', 'Group.average(opt)', 'pass'),
    ('sud2.py', 'ddpm.noise_like = lambda x, generator=None: cls.own(',
     'ddpm.noise_like = lambda x, generator=None: (lambda v: v[:len(x)])('),
    ('sud2.py', 'Group.gather(mirrored(x_hat, flip))', 'mirrored(x_hat, flip)'),
    ('sud2.py', 'keep if start == steps else parts', 'keep'),
]
SLOW = ('help or stopping or two_processes or full_disk or damaged or readme or another_runs '
        'or number_of_processes or tables_are or foreign or huge or leaves_work '
        'or mutations_are')


def killer(name, old, new, tests):
    """Runs tests, chosen as -k does, on a mutated copy -> the first that failed, or None."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / 'sud2'
        shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns('.git', 'runs', '__pycache__'))
        text = (copy / name).read_text()
        assert old in text, (name, old)
        (copy / name).write_text(text.replace(old, new, 1))
        out = subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-k', tests],
            cwd=copy, capture_output=True, text=True,
            env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}).stdout
        failed = re.search(r'^(?:FAILED|ERROR) \S+::(\S+)', out, re.MULTILINE)
        return failed and failed[1]


def main(first=0, last=len(MUTATIONS + OF_SEVERAL_PROCESSES)):
    survivors = 0
    for k, (name, old, new) in list(enumerate(MUTATIONS + OF_SEVERAL_PROCESSES))[first:last]:
        test = killer(name, old, new, f'not ({SLOW})' if k < len(MUTATIONS) else
                      'two_processes_compute or number_of_processes')
        survivors += test is None
        print(f'{k:2d} {name}: {old!r} -> {new!r}: {test or "SURVIVED"}', flush=True)
    print(f'{last - first - survivors} of {last - first} killed')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
