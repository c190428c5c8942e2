# SPDX-License-Identifier: MIT
"""Embedded tasks, forward operators and data-set loaders, from sud2. Copy freely; imports nothing
else from this project.

Images are uint8 `(N, 3, H, W)` tensors at rest and float `(B, 3, H, W)` in [-1, 1] at work;
`to_float` and `to_bytes` are the only conversions. Masks are bool `(N, 1, H, W)`, True in the hole.
Every source is reproducible from a seed.

    >>> x, hole = draw_faces(2, size=32, seed=0)
    >>> x.shape, hole.shape, x.dtype, hole[0].sum().item()
    (torch.Size([2, 3, 32, 32]), torch.Size([2, 1, 32, 32]), torch.uint8, 232)
"""
import contextlib
import hashlib
import math
import os
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

CHUNK = 256     # faces drawn at a time; the i-th face of a seed is the same however many are drawn


def to_float(u):
    """uint8 images -> float32 in [-1, 1]."""
    return u.float() / 127.5 - 1


def to_bytes(x):
    """Float images in [-1, 1] -> uint8, rounded, values outside clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


def punch_hole(x, hole):
    """Forward operator of in-painting: pixels of x (B, 3, H, W), uint8, in the hole become grey."""
    return torch.where(hole, 128, x).byte()


# ---------------------------------------------------------------------------- drawn faces
# Painter's algorithm over signed distances (negative inside), anti-aliased by coverage. The canvas
# is [-1, 1] x [-1, 1], y down; a parameter is (B, 1, 1, 1), a colour (B, 3, 1, 1) in [0, 1].

def smoothstep(v):
    """0 below 0, 1 above 1, smooth between."""
    v = v.clamp(0, 1)
    return v * v * (3 - 2 * v)


def ellipse(x, y, a, b):
    """Signed distance, nearly, to the ellipse of half axes a, b around the origin."""
    k = ((x / a) ** 2 + (y / b) ** 2).sqrt()
    return k * (k - 1) / ((x / a ** 2) ** 2 + (y / b ** 2) ** 2).sqrt().clamp(min=1e-6)


def box(x, y, a, b, r):
    """Signed distance to the box of half sides a, b with corners rounded by r."""
    dx, dy = x.abs() - (a - r), y.abs() - (b - r)
    outside = (dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0) - r


def curve(x, y, half, bend):
    """Distance, nearly, to the arc y = bend (x / half)² of |x| < half; bend > 0: ends lower."""
    inside = (x / half).clamp(-1, 1)
    return ((x - inside * half) ** 2 + (y - bend * inside ** 2) ** 2).sqrt()


def dice(g):
    """-> draws of CHUNK parameters each from generator g: uniform, normal, and 1 with chance p."""
    def u(lo=0.0, hi=1.0, channels=1):
        return lo + (hi - lo) * torch.rand(CHUNK, channels, 1, 1, generator=g)

    def n(std):
        return std * torch.randn(CHUNK, 1, 1, 1, generator=g)

    def chance(p):
        return (u() < p).float()
    return u, n, chance


def rgb(*colour):
    """Red, green, blue in [0, 1] -> (1, 3, 1, 1)."""
    return torch.tensor(colour).view(1, 3, 1, 1)


def face_parameters(g):
    """CHUNK faces' random parameters from generator g: a dict of (CHUNK, 1, 1, 1) and colours.

    What a person would expect to go together does: skin with hair, iris and lips; age with grey or
    lost hair, glasses and wrinkles; hair length with beard, lips and jaw; yaw with gaze.
    """
    draws = dice(g)
    p = person(*draws)
    for more in (hair_style, features, surroundings):
        more(p, *draws)
    return p


def person(u, n, chance):
    """Sex, age, pose, the head's shape, light, and the colours of skin, hair, iris and lips."""
    p = {'masculine': chance(0.5), 'age': u(), 'melanin': u()}
    m, age, dark = p['masculine'], p['age'], p['melanin']
    p.update(cx=n(.05), cy=.04 + n(.04), tilt=n(.09), yaw=n(.5).clamp(-1, 1), pitch=n(.03))
    p.update(a=.44 + .03 * m + n(.025), up=.52 + n(.03), low=.56 + .04 * m + n(.035),
             jaw=2.0 + .7 * m * u() + .2 * u(), light=u(-math.pi, 0), strength=u(.05, .38))
    skin = torch.lerp(rgb(.97, .82, .73), rgb(.80, .58, .42), (2 * dark).clamp(max=1))
    skin = torch.lerp(skin, rgb(.36, .22, .15), (2 * dark - 1).clamp(min=0))
    p['skin'] = (skin + u(-.03, .03, 3)) * u(.9, 1.05)
    fair = torch.lerp(rgb(.20, .12, .07), rgb(.88, .70, .40), u() ** 1.3)
    fair = torch.where(u() < .15, rgb(.62, .27, .11), fair)
    hair = torch.lerp(fair, rgb(.07, .05, .05), smoothstep(2.5 * dark + n(.25)))
    grey = smoothstep((age - .68) * 5 + n(.3))
    p['hair'] = torch.lerp(hair, rgb(.75, .74, .73) * u(.75, 1.1), grey).clamp(.02, 1)
    p['iris'] = torch.where(u() < 1.6 * dark + .2, rgb(.27, .15, .07),
                            torch.where(u() < .5, rgb(.25, .45, .68), rgb(.33, .48, .27)))
    red = torch.lerp(rgb(.78, .35, .35), rgb(.72, .10, .16), u() * (1 - m))
    p['lips'] = torch.lerp(p['skin'] * rgb(.85, .62, .60), red, .25 + .5 * u() * (1 - m))
    return p


def hair_style(p, u, n, chance):
    """Hair on head and chin."""
    m, age, dark = p['masculine'], p['age'], p['melanin']
    long = chance(.85 - .73 * m)
    p['length'] = torch.where(long > 0, u(.25, 1.3), u(-.35, -.05))     # where the back hair ends
    p['volume'] = .05 + .12 * u() + .05 * long
    p['wave'], p['wave_f'], p['phase'] = .05 * u() * chance(.5), u(8, 18), u(0, 6.28)
    p['bald'] = chance(.25 * m * (age > .55)) * (1 - long)
    p['afro'] = chance(.5 * (dark > .7)) * (1 - p['bald'])
    p['fringe'] = (u() * 4).floor()               # straight, side parting, middle parting, swept up
    p['side'] = torch.where(u() < .5, -1.0, 1.0)
    p['hairline'] = -.33 + n(.035) - .10 * m * age
    p['bangs'] = chance(.35) * (1 - m)
    p['beard'] = chance(.5) * m * u(.35, 1) * (1 - long)
    p['beard_low'] = (u() * 3).floor()                                  # full, goatee, moustache


def features(p, u, n, chance):
    """Eyes, brows, nose, mouth, cheeks, wrinkles, glasses."""
    m, age, dark = p['masculine'], p['age'], p['melanin']
    p['eye_x'], p['eye_y'] = .19 + n(.012), -.05 + n(.018)
    p['eye_a'], p['eye_b'] = .088 + n(.008), .050 + n(.010).clamp(-.022, .03)
    p['gaze_x'] = (.4 * p['yaw'] + n(.35)).clamp(-1, 1)
    p['gaze_y'] = n(.3).clamp(-1, 1)
    p['lid'] = .15 + .5 * u() * (1 - m) + .1 * u()
    p['brow_w'], p['brow_up'] = .014 + .014 * m + n(.003), .115 + n(.018)
    p['brow_slant'], p['brow_bend'] = n(.10), .03 + n(.015)
    p['nose_len'], p['nose_w'] = .20 + n(.025), .062 + .035 * dark + n(.01)
    p['mouth_y'], p['mouth_w'] = .325 + n(.02), .155 + .01 * m + n(.02)
    p['smile'] = -.02 - .05 * u() + .03 * chance(.25)
    p['open'] = chance(.5) * u(.02, .075)
    p['teeth'] = chance(.75)
    p['lip'] = .022 + .014 * (1 - m) + .012 * dark + n(.004)
    p['blush'], p['wrinkle'] = u(0, .35) * (1 - .5 * m), (age - .35).clamp(min=0) * u(.5, 1.2)
    p['glasses'], p['round'] = chance(.12 + .33 * age), chance(.5)
    p['frame'] = u(.03, .35) * torch.where(u() < .3, rgb(1.6, .8, .5), rgb(1, 1, 1))
    p['frame_w'], p['shades'] = u(.014, .030), chance(.12)


def surroundings(p, u, n, chance):
    """Background and clothes."""
    p['bg'], p['bg2'] = (torch.lerp(u(.1, .95, 3), u(.1, .95), .45) for _ in range(2))
    p['bg_dir'] = u(-1.2, 1.2)
    p['disc'], p['disc_x'], p['disc_y'] = u(.1, .9, 3), u(-1, 1), u(-1, .6)
    p['disc_r'], p['disc_a'] = u(.15, .5), u(0, .7)
    p['cloth'], p['cloth2'] = u(.05, .95, 3) * u(.6, 1.05), u(.05, .95, 3)
    p['neckline'], p['shoulder'] = (u() * 3).floor(), .72 + .14 * p['masculine'] + n(.05)
    p['stripes'], p['stripe_f'] = chance(.3), u(10, 22)


class Canvas:
    """Images (n, 3, size, size) that are painted on, with the coordinates of their pixels."""

    def __init__(self, n, size, width=2):
        centre = (torch.arange(size) + .5) / size * 2 - 1
        self.x, self.y = centre.view(1, 1, 1, -1), centre.view(1, 1, -1, 1)
        self.pixel = width / size                       # of a canvas that is `width` units wide
        self.image = torch.zeros(n, 3, size, size)

    def cover(self, d):
        """Share of each pixel covered by the region where the signed distance d < 0."""
        return (.5 - d / self.pixel).clamp(0, 1)

    def line(self, d, width):
        """Share of each pixel covered by a line of half-width `width` at distance d, d >= 0."""
        thin = torch.as_tensor(2 * width / self.pixel).clamp(max=1)
        return self.cover(d - width) * thin

    def paint(self, colour, share):
        self.image = torch.lerp(self.image, torch.as_tensor(colour), share)


class Portrait(Canvas):
    """A canvas of faces with their own, turned coordinates u, v, and the light on them."""

    def __init__(self, p, size):
        super().__init__(len(p['tilt']), size, 2 / 1.18)
        cos, sin = p['tilt'].cos(), p['tilt'].sin()
        x, y = (self.x - p['cx']) / 1.18, (self.y - p['cy']) / 1.18 - .5
        self.u, self.v = cos * x + sin * y, -sin * x + cos * y + .5     # heads turn about the neck
        self.shade = 1 + p['strength'] * ((self.x - p['cx']) * p['light'].cos()
                                          + (self.y - p['cy']) * p['light'].sin())


def paint_background(c, p):
    """Two-colour gradient, a soft disc, and the light's direction, which falls on all layers."""
    ramp = (.5 + .5 * (c.x * p['bg_dir'].sin() + c.y * p['bg_dir'].cos())).clamp(0, 1)
    c.paint(torch.lerp(p['bg'], p['bg2'], ramp) * c.shade, torch.ones(1))
    d = ((c.x - p['disc_x']) ** 2 + (c.y - p['disc_y']) ** 2).sqrt()
    c.paint(p['disc'] * c.shade, p['disc_a'] * smoothstep((p['disc_r'] - d) / .12 + .5))


def paint_back_hair(c, p):
    """The hair behind head, neck and shoulders."""
    wave = p['wave'] * (p['wave_f'] * (c.u + c.v) + p['phase']).sin()
    head = ellipse(c.u, c.v + .08, p['a'] + p['volume'], p['up'] + p['volume']) + wave
    middle, half = (p['length'] - .35) / 2, ((p['length'] + .35) / 2).clamp(min=.02)
    fall = box(c.u, c.v - middle, p['a'] + .6 * p['volume'], half, .12) + wave
    afro = ellipse(c.u, c.v + .2, p['a'] + .26, p['up'] + .2)
    long = torch.where(p['length'] > 0, torch.minimum(head, fall), head)
    d = torch.where(p['afro'] > 0, afro, long)
    c.paint(p['hair'] * .82 * c.shade, c.cover(d + 2 * p['bald']))


def paint_body(c, p):
    """Neck with the chin's shadow, shoulders, and what is worn on them."""
    neck = p['a'] * (.48 + .1 * p['masculine'])
    c.paint(p['skin'] * .88 * c.shade, c.cover(box(c.u, c.v - .7, neck, .45, .05)))
    shadow = smoothstep((.78 - c.v) / .25) * .35
    c.paint(p['skin'] * .5, shadow * c.cover(c.u.abs() - neck) * c.cover(.3 - c.v))
    body = ellipse(c.x - p['cx'], c.y - 1.28, p['shoulder'], .52)
    stripes = p['stripes'] * ((c.y * p['stripe_f']).sin() > .2)
    worn = torch.lerp(p['cloth'], p['cloth2'], stripes) * c.shade
    vee = (c.x - p['cx']).abs() + .45 * (c.y - 1.12)                # an open collar, a round one
    crew = ellipse(c.x - p['cx'], c.y - .74, neck + .06, .13)
    cut = torch.where(p['neckline'] == 0, vee, torch.where(p['neckline'] == 1, crew, torch.ones(1)))
    c.paint(worn, c.cover(torch.maximum(body, -cut)))
    collar = torch.maximum(body, (vee.abs() - .05))
    c.paint(p['cloth2'] * c.shade, c.cover(collar) * (p['neckline'] == 0))


def paint_head(c, p):
    """Ears and the face without its features -> signed distance of the face's outline."""
    for side in (-1, 1):
        ear = ellipse(c.u - side * (p['a'] + .01 - .04 * side * p['yaw']), c.v + .02, .06, .12)
        c.paint(p['skin'] * .86 * c.shade, c.cover(ear))
    b = torch.where(c.v < 0, p['up'], p['low'])
    k = torch.where(c.v < 0, 2.0, p['jaw'])
    x, y = (c.u / p['a']).abs().clamp(min=1e-4), (c.v / b).abs().clamp(min=1e-4)
    r = (x ** k + y ** k) ** (1 / k)                                # jaws are squarer than ellipses
    face = (r - 1) * torch.minimum(p['a'], b)
    rim = 1 - .22 * smoothstep((r - .72) / .3)
    c.paint(p['skin'] * (c.shade * rim).clamp(max=1.25), c.cover(face))
    return face


def paint_beard(c, p, u, face):
    """Full beard, goatee or moustache, in the hair's colour, thin or dense."""
    v = c.v - p['pitch']
    moustache = curve(u, v - p['mouth_y'] + .065, p['mouth_w'] * .95, .035) - .026
    goatee = ellipse(u, v - p['mouth_y'] - .12, p['mouth_w'] * .8, .13)
    full = torch.maximum(.10 + .25 * (1 - (u / .4) ** 2).clamp(min=0) - v, face)
    kind = p['beard_low']
    d = torch.where(kind == 0, torch.minimum(full, moustache),
                    torch.where(kind == 1, torch.minimum(goatee, moustache), moustache))
    c.paint(p['hair'] * .8 * c.shade, p['beard'] * c.cover(torch.maximum(d, face)))


def paint_eyes(c, p, u):
    """Whites, irises that share a gaze, pupils, lids, brows."""
    dark = p['skin'] * .35
    for side in (-1, 1):
        x = u - side * p['eye_x'] * (1 - .12 * side * p['yaw'])
        y = c.v - p['eye_y'] - p['pitch']
        a, b = p['eye_a'] * (1 - .15 * (side * p['yaw']).clamp(min=0)), p['eye_b']
        white = ellipse(x, y, a, b)
        c.paint(p['skin'] * .72, c.cover(ellipse(x, y + .01, a * 1.3, b * 1.7)) * .6)  # the socket
        c.paint(.94 * c.shade.clamp(max=1), c.cover(white))
        gx, gy = x - .4 * a * p['gaze_x'], y - .25 * b * p['gaze_y']
        iris = ellipse(gx, gy, b * .95, b * .95)
        c.paint(p['iris'], c.cover(torch.maximum(iris, white)))
        pupil = ellipse(gx, gy, b * .45, b * .45)
        c.paint(.03, c.cover(torch.maximum(pupil, white)))
        c.paint(dark, c.line(curve(x, y + b, a * 1.1, b * .9), .010 + .012 * p['lid']) * .9)
        slant = y + p['brow_up'] + p['brow_slant'] * side * x
        brow = curve(x, slant, a * 1.25, p['brow_bend'])
        c.paint(p['hair'] * .62, .92 * c.line(brow, p['brow_w']))


def paint_nose(c, p, u):
    """Nose with its shaded side and nostrils, cheeks, and the folds that come with age."""
    v, width = c.v - p['pitch'], p['nose_w']
    tip = p['eye_y'] + p['nose_len'] + .03
    ridge = (u + .35 * width * p['light'].cos().sign()).abs() + .12 * (v - tip).abs()
    length = c.cover((v - tip + p['nose_len'] / 2).abs() - p['nose_len'] / 2)
    c.paint(p['skin'] * .62, .55 * c.line(ridge, .022) * length)
    c.paint(p['skin'] * 1.12, .6 * c.cover(ellipse(u, v - tip + .03, width * .45, .03)))
    for side in (-1, 1):
        nostril = curve(u - side * .6 * width, v - tip - .015, width * .45, .012)
        c.paint(p['skin'] * .42, .9 * c.line(nostril, .014))
        cheek = ellipse(u - side * .25, v - .17, .13, .10)
        rosy = p['skin'] * torch.tensor([1.05, .72, .70]).view(1, 3, 1, 1)
        c.paint(rosy, p['blush'] * smoothstep(-cheek / .1))
        fold = curve(v - tip - .07, u - side * (width + .07), .08, side * .03)
        c.paint(p['skin'] * .6, (p['wrinkle'] * .8).clamp(max=.7) * c.line(fold, .010))


def paint_mouth(c, p, u):
    """Lips, closed or open, and open with or without teeth."""
    x, y, width = u, c.v - p['pitch'] - p['mouth_y'], p['mouth_w']
    middle = (y - p['smile'] * (x / width).clamp(-1, 1) ** 2).abs()
    taper = (1 - (x / width) ** 2).clamp(min=0).sqrt()
    lips = torch.maximum(x.abs() - width, middle - (p['lip'] + p['open']) * taper)
    c.paint(p['lips'] * c.shade, c.cover(lips))
    inner = torch.maximum(x.abs() - .88 * width, middle - p['open'] * taper)
    c.paint(torch.tensor([.25, .06, .06]).view(1, 3, 1, 1), c.cover(inner) * (p['open'] > 0))
    upper = y - p['smile'] * (x / width).clamp(-1, 1) ** 2 - .15 * p['open']
    teeth = c.cover(torch.maximum(inner, upper)) * (p['open'] > .03) * p['teeth']
    c.paint(.93, teeth)
    closed = c.line(curve(x, y, width * .95, p['smile']), .009) * (p['open'] == 0)
    c.paint(p['lips'] * .45, closed)


def paint_glasses(c, p, u):
    """Round or square frames, clear or dark lenses."""
    y = c.v - p['eye_y'] - p['pitch'] - .01
    for side in (-1, 1):
        x = u - side * (p['eye_x'] + .005)
        lens = torch.where(p['round'] > 0, ellipse(x, y, .15, .135), box(x, y, .16, .105, .04))
        c.paint(p['frame'] * .4, p['glasses'] * p['shades'] * .85 * c.cover(lens))
        c.paint(p['frame'], p['glasses'] * c.line(lens.abs(), p['frame_w']))
        temple = torch.maximum((y + .03).abs() - p['frame_w'], (x * side - .15).clamp(max=0).abs())
        c.paint(p['frame'], p['glasses'] * c.cover(torch.maximum(temple, c.u.abs() - p['a'])))
    bridge = torch.maximum((y + .02).abs() - p['frame_w'], u.abs() - .05)
    c.paint(p['frame'], p['glasses'] * c.cover(bridge))


def paint_front_hair(c, p):
    """The hair that falls over the forehead -> the share of each pixel that it covers."""
    x = c.u * p['side']
    straight = p['hairline'] + .14 * p['bangs'] + .02 * (22 * c.u + p['phase']).sin()
    parted = p['hairline'] + .05 + .32 * (x + .12) * (x > -.12) + .7 * (-x - .12) * (x <= -.12)
    middle = p['hairline'] - .06 + .75 * c.u.abs()
    swept = p['hairline'] - .03 - .10 * (1 - (c.u / .35) ** 2)
    line = torch.where(p['fringe'] == 0, straight, torch.where(
        p['fringe'] == 1, parted, torch.where(p['fringe'] == 2, middle, swept)))
    cap = ellipse(c.u, c.v + .08, p['a'] + .02 + .5 * p['volume'], p['up'] + .9 * p['volume'])
    side = torch.maximum(cap, (p['a'] - .07 - .1 * c.v) - c.u.abs())      # in front of the ears
    side = torch.maximum(side, c.v - torch.where(p['length'] > 0, .15, -.08))
    d = torch.minimum(torch.maximum(cap, c.v - line), side)
    share = c.cover(d) * (1 - p['bald'])
    strands = 1 + .16 * (26 * c.u + 5 * c.v + p['phase']).sin() * smoothstep(-c.v + .2)
    gloss = .22 * smoothstep(1 - ((c.u - .2 * p['light'].cos()) ** 2 + (c.v + .45) ** 2) / .05)
    c.paint((p['hair'] * strands * c.shade + gloss * (.3 + p['hair'])).clamp(0, 1), share)
    return share


def paint_faces(p, size):
    """Faces with parameters p -> images float (B, 3, size, size) in [0, 1], holes bool."""
    c = Portrait(p, size)
    paint_background(c, p)
    paint_back_hair(c, p)
    paint_body(c, p)
    face = paint_head(c, p)
    u = c.u - .10 * p['yaw'] * (1 - (c.u / .5) ** 2).clamp(min=0)       # the head's turn
    paint_beard(c, p, u, face)
    paint_nose(c, p, u)
    paint_mouth(c, p, u)
    paint_eyes(c, p, u)
    paint_glasses(c, p, u)
    hair = paint_front_hair(c, p)
    return c.image, c.cover(face) * (1 - hair) > .5


def draw(n, size, seed, parameters, paint):
    """n pictures, CHUNK parameters at a time -> two tensors of what paint(p, size) returns."""
    g, out = torch.Generator().manual_seed(seed), None
    step = max(1, CHUNK * 32 * 32 // size ** 2)             # as many at a time as fit the cache
    for i in range(0, n, CHUNK):
        p = parameters(g)
        for j in range(i, min(n, i + CHUNK), step):
            k = min(n, i + CHUNK, j + step)
            painted = paint({key: v[j - i:k - i] for key, v in p.items()}, size)
            out = out or [u.new_empty(n, *u.shape[1:]) for u in painted]
            for whole, part in zip(out, painted):
                whole[j:k] = part
    return out


def draw_faces(n, size, seed):
    """n drawn faces of size x size -> images uint8 (n, 3, size, size), holes bool (n, 1, ...).

    The hole is the face itself (skin, eyes, brows, nose, mouth, beard, glasses) as far as no hair
    falls over it. The i-th face of a seed does not depend on n, nor its looks on the size.
    """
    def paint(p, size):
        x, hole = paint_faces(p, size)
        return to_bytes(2 * x - 1), hole
    return draw(n, size, seed, face_parameters, paint)


# ---------------------------------------------------------------------------- drawn scenes
# The ground is a plane seen from HEIGHT above it: what stands at depth d has its foot HEIGHT / d
# below the horizon, and its size on the canvas falls with d.

HEIGHT, FAR, OBJECTS = .25, 4.0, 9


def scene_parameters(g):
    """CHUNK scenes' random parameters: weather, relief, road, objects sorted far to near, haze.

    Season goes with grass, leaves and hills; the hour with light, sky and the colour of the haze.
    """
    u, n, chance = dice(g)
    season, dusk = u(), chance(.3) * u(.3, 1)               # 0 spring .. 1 winter; 0 noon .. 1 dusk
    p = {'horizon': u(-.35, .15), 'sun_x': u(-1, 1), 'cloud_f': u(2, 5), 'cloud': u(0, .8)}
    p['light'] = torch.lerp(rgb(1, 1, .98), rgb(1, .74, .52), dusk) * u(.75, 1.05)
    p['zenith'] = torch.lerp(torch.lerp(rgb(.25, .48, .82), rgb(.45, .55, .68), u()),
                             rgb(.30, .28, .45), dusk)
    p['low_sky'] = torch.lerp(rgb(.75, .86, .95), rgb(.97, .65, .42), dusk) * u(.85, 1.03)
    grass = torch.lerp(rgb(.33, .52, .16), rgb(.62, .55, .28), smoothstep(3 * season - .8))
    snow = smoothstep(12 * (season - .85))
    p['ground'] = torch.lerp(grass * u(.75, 1.2), rgb(.90, .92, .96), snow)
    p['field'] = p['ground'] * u(.75, 1.2) * u(.88, 1.12, 3)
    p['field_y'], p['field_s'], p['furrow'] = u(.1, .8), n(.15), chance(.5) * u(.04, .14)
    for k in range(3):                                      # mountains, hills, near hills
        p[f'high{k}'] = u(.02, .42 - .12 * k) * chance(.85)
        p[f'wave{k}'], p[f'phase{k}'] = u(1, 3.5), u(0, 6.28)
        p[f'hill{k}'] = torch.lerp(p['ground'] * u(.45, .95), rgb(.38, .36, .38), u(0, .9 - .3 * k))
    p['cap'] = chance(.4)                                   # snow on the mountains
    p['road'], p['road_x'], p['bend'] = chance(.65), n(.5), n(.5)
    p['road_w'], p['asphalt'] = u(.5, 1.3), torch.lerp(rgb(.32, .32, .34), rgb(.62, .53, .42), u())
    p['line'] = chance(.6)
    depth = (math.log(.3) + (math.log(2.6) - math.log(.3)) * torch.rand(
        CHUNK, OBJECTS, generator=g)).exp().sort(1, descending=True).values
    town = u()
    for k in range(OBJECTS):
        p[f'd{k}'] = depth[:, k].view(-1, 1, 1, 1)
        p[f'kind{k}'] = torch.where(chance(.8) > 0, torch.where(
            u() < town, 2.0, chance(.4)), 3.0)              # leafy, conifer, house, none
        side = torch.where(u() < .5, -1.0, 1.0)
        p[f'x{k}'] = side * u(.12, 1.05)
        p[f'h{k}'], p[f'w{k}'] = u(1.1, 2.6), u(.45, .8)
        leaf = torch.lerp(rgb(.16, .36, .11), rgb(.70, .38, .10), smoothstep(4 * (season - .45)))
        leaf = torch.where(p[f'kind{k}'] == 1, rgb(.13, .29, .14), leaf) * u(.65, 1.25)
        p[f'leaf{k}'] = torch.lerp(leaf * u(.85, 1.15, 3), rgb(.75, .76, .80), .5 * snow)
        wall = torch.lerp(rgb(.82, .76, .66), u(.3, .9, 3), .6)
        p[f'wall{k}'], p[f'roof{k}'] = wall, torch.lerp(rgb(.52, .22, .15), u(.15, .5), u())
        p[f'storeys{k}'], p[f'gable{k}'] = u(2, 6).floor(), chance(.6)
    p['beta'], p['reach'] = u(.35, 1.7), u(.7, 1.4)         # haze: density, scale of the depth
    p['airlight'] = (torch.lerp(rgb(.88, .90, .93), rgb(.95, .82, .70), dusk)
                     * u(.75, 1.05) + u(-.05, .05, 3)).clamp(0, 1)
    return p


class View(Canvas):
    """A canvas of scenes that keeps the depth (B, 1, size, size) of what is painted."""

    def __init__(self, p, size):
        super().__init__(len(p['horizon']), size)
        self.below = self.y - p['horizon']
        self.depth = torch.full((len(p['horizon']), 1, size, size), FAR)

    def place(self, colour, share, depth):
        self.paint(colour, share)
        self.depth = torch.lerp(self.depth, torch.as_tensor(depth), share)


def paint_sky_and_hills(c, p):
    """Sky with a glow and clouds, then three ridges, each nearer and lower than the last."""
    up = smoothstep(-c.below / 1.1)
    c.paint(torch.lerp(p['low_sky'], p['zenith'], up), torch.ones(1))
    glow = (1 - ((c.x - p['sun_x']) ** 2 + c.below ** 2).sqrt() / .8).clamp(min=0)
    c.paint(rgb(1, .95, .85), .5 * glow ** 2)
    wisps = (p['cloud_f'] * c.x + 3 * (9 * c.below).sin()).sin() * (13 * c.below + c.x).sin()
    c.paint(.97 * p['light'], p['cloud'] * smoothstep(wisps * 1.3) * up)
    for k, depth in enumerate((3.2, 2.4, 1.7)):
        f, phase = p[f'wave{k}'], p[f'phase{k}']
        ridge = p[f'high{k}'] * (.6 + .25 * (2 * f * c.x + phase).sin()
                                 + .15 * (5.3 * f * c.x + 2 * phase).sin())
        shade = .85 + .3 * smoothstep(.5 + .5 * (3.1 * f * c.x + phase + 8 * c.below).cos())
        share = c.cover(-c.below - ridge) * (p[f'high{k}'] > 0)
        c.place(p[f'hill{k}'] * p['light'] * shade, share, depth)
        if k == 0:
            snow = c.cover(-c.below - ridge) * c.cover(c.below + .62 * ridge)
            c.paint(.93 * p['light'], snow * p['cap'] * (p['high0'] > .2))


def paint_ground(c, p):
    """Meadow, a field with furrows that meet at the horizon, a road that bends away."""
    depth = (HEIGHT / c.below.clamp(min=1e-3)).clamp(max=FAR)
    ground = c.cover(-c.below)
    near = .8 + .25 * c.below.clamp(0, 1)
    c.place(p['ground'] * p['light'] * near, ground, depth)
    field = c.cover(p['field_y'] + p['field_s'] * c.x - 1.6 * c.below) * ground
    furrows = 1 + p['furrow'] * (14 * (c.x - .3) / (c.below.clamp(min=0) + .12)).sin()
    c.paint(p['field'] * p['light'] * near * furrows, field)
    middle = p['road_x'] * c.below + p['bend'] * c.below * (1 - c.below)
    off, half = (c.x - middle).abs(), p['road_w'] * c.below.clamp(min=0) * .5
    road = c.cover(off - half) * ground * p['road']
    c.paint(p['asphalt'] * p['light'], road)
    dashes = ((6 * depth.clamp(max=2)).sin() > -.2) * p['line']
    c.paint(.9 * p['light'], c.cover(off - .06 * half) * road * dashes)


def paint_object(c, p, k):
    """A leafy tree, a conifer or a house with its shadow, standing at its depth."""
    d, scale = p[f'd{k}'], HEIGHT / p[f'd{k}']
    x, y = c.x - p[f'x{k}'], c.below - scale                # 0 at the foot, y < 0 above it
    kind, high = p[f'kind{k}'], p[f'h{k}'] * scale
    wide = p[f'w{k}'] * high
    lit = 1 + .35 * (x / wide).clamp(-1, 1) * p['sun_x'].sign()
    tall = y + high
    trunk = torch.maximum(x.abs() - .09 * wide, torch.maximum(y, -y - .55 * high))
    bumps = .05 * wide * ((11 * x + 7 * y) / wide).sin()
    leafy = ellipse(x, y + .64 * high, .5 * wide, .38 * high) + bumps
    slope = .32 * wide * (tall / high) * (1 + .18 * (22 * tall / high).sin())
    conifer = torch.maximum(x.abs() - slope, y + .12 * high)
    crown = torch.where(kind == 0, leafy, conifer)
    tree = (kind < 2).float()
    shadow = ellipse(x + .3 * wide * p['sun_x'].sign(), y, .6 * wide, .07 * high)
    c.paint(p['ground'] * .45, .6 * c.cover(shadow) * (kind < 3) * c.cover(-c.below))
    c.place(rgb(.28, .20, .14) * p['light'], c.cover(trunk) * tree, d)
    c.place(p[f'leaf{k}'] * p['light'] * lit, c.cover(crown) * tree, d)
    house = (kind == 2).float()
    wall = box(x, y + .42 * high, .55 * wide, .42 * high, 0)
    side = 1 - .3 * ((x * p['sun_x'].sign()) < -.1 * wide)
    c.place(p[f'wall{k}'] * p['light'] * side, c.cover(wall) * house, d)
    floors, rooms = p[f'storeys{k}'] * 3.14159, 3 * 3.14159
    panes = ((floors * y / (.84 * high)).sin().abs() > .6) & ((rooms * x / wide).sin().abs() > .55)
    c.paint(rgb(.16, .20, .26), .85 * c.cover(wall + .05 * wide) * panes * house)
    gable = torch.maximum(x.abs() - .62 * wide * (tall / (.2 * high)).clamp(0, 1),
                          torch.maximum(-tall, y + .83 * high))
    c.place(p[f'roof{k}'] * p['light'], c.cover(gable) * house * p[f'gable{k}'], d)


def paint_scenes(p, size):
    """Scenes with parameters p -> images float (B, 3, size, size) in [0, 1], depth (B, 1, ...)."""
    c = View(p, size)
    paint_sky_and_hills(c, p)
    paint_ground(c, p)
    for k in range(OBJECTS):
        paint_object(c, p, k)
    return c.image.clamp(0, 1), c.depth * p['reach']


def haze(x, depth, beta, airlight):
    """Forward operator of dehazing: I = J t + A (1 - t), t = exp(-β d), for J = x (B, 3, H, W) in
    [0, 1], d = depth (B, 1, H, W), β (B, 1, 1, 1), A = airlight (B, 3, 1, 1) -> like x."""
    t = (-beta * depth).exp()
    return x * t + airlight * (1 - t)


def draw_scenes(n, size, seed):
    """n drawn scenes and the same in haze, uint8 (n, 3, size, size) each."""
    def paint(p, size):
        x, depth = paint_scenes(p, size)
        hazy = haze(x, depth, p['beta'], p['airlight'])
        return to_bytes(2 * x - 1), to_bytes(2 * hazy - 1)
    return draw(n, size, seed, scene_parameters, paint)


# ---------------------------------------------------------------------------- tasks
@dataclass
class Split:
    """What a run trains and is scored on: uint8 tensors (N, C, H, W).

    pairs_x, pairs_y: P. measurements: U_y; measurements_x: their true images, for the oracle alone,
    or None. images: U_x. test_x, test_y: what the scores are taken on, tensors or, where sizes
    vary, lists of (C, H, W); test_x may be None. test_hole: bool (N, 1, H, W) or None.
    """
    pairs_x: torch.Tensor
    pairs_y: torch.Tensor
    measurements: torch.Tensor
    measurements_x: torch.Tensor | None
    images: torch.Tensor
    test_x: torch.Tensor | list | None
    test_y: torch.Tensor | list
    test_hole: torch.Tensor | None = None

    def to(self, device):
        """Puts what is trained on there, what is scored on stays. Errors: it does not fit."""
        try:
            for k in ('pairs_x', 'pairs_y', 'measurements', 'measurements_x', 'images'):
                if getattr(self, k) is not None:
                    setattr(self, k, getattr(self, k).to(device))
        except torch.OutOfMemoryError as e:
            raise ValueError(f'--device {device}: no room for the images; use a smaller --size or '
                             '--clean') from e
        return self

    def grey(self):
        """The same split with one channel, the luminance."""
        def luminance(u):
            if isinstance(u, list):
                return [luminance(v[None])[0] for v in u]
            if u is None or u.dtype == torch.bool:
                return u
            parts = (v.float().unbind(1) for v in u.split(CHUNK))   # floats of all would be large
            return torch.cat([(.299 * r + .587 * g + .114 * b).round().byte().unsqueeze(1)
                              for r, g, b in parts])
        return Split(**{k: luminance(v) for k, v in vars(self).items()})


def embedded(task, size, pairs, measurements, clean, test, seed, validation=0):
    """Drawn faces ('inpaint') or scenes ('dehaze') as a Split; the seed varies all but U_x, test.

    Drawn from disjoint streams: a seed's, the clean images', the test images' and, for choosing
    hyper-parameters, `validation` images that stand in for the test images.
    """
    pictures = draw_faces if task == 'inpaint' else draw_scenes

    def degraded(n, stream):
        x, other = pictures(n, size, stream)
        return (x, punch_hole(x, other), other) if task == 'inpaint' else (x, other, None)
    x, y, _ = degraded(pairs + measurements, 1000 + seed)
    test_x, test_y, test_hole = degraded(validation or test, 2 if validation else 1)
    images, _ = pictures(clean, size, 0)
    return Split(x[:pairs], y[:pairs], y[pairs:], x[pairs:], images, test_x, test_y, test_hole)


IMAGE_ENDINGS = {'.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff'}
MOST_PIXELS = 10 ** 8           # more are refused before they are decoded


def image_files(folder):
    """All image files below a folder and what it links to, but for hidden ones, sorted by path.
    Errors: no such folder, no image in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f'{folder}: no such folder')
    below = (Path(root, f) for root, _, names in os.walk(folder, followlinks=True) for f in names)
    files = [f for f in sorted(below) if f.suffix.lower() in IMAGE_ENDINGS
             and not any(part.startswith('.') for part in f.relative_to(folder).parts)]
    if not files:
        raise ValueError(f'{folder}: no image in it ({", ".join(sorted(IMAGE_ENDINGS))})')
    return files


@contextlib.contextmanager
def opened(path):
    """-> an image file of which only the head, with width and height, is read yet. Errors: no
    image, a TIFF of several pages, a broken one, also where it is decoded later, inside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')             # of sizes that open_image refuses
            image = Image.open(path)
            pages = image.n_frames if image.format == 'TIFF' else 1
        with image:
            if pages > 1:                               # a stack, most of which would be lost
                raise ValueError(f'{pages} pages; save each as a picture of its own')
            yield image
    except Exception as e:              # whatever a broken file does to the decoder
        raise ValueError(f'{path}: not a readable image ({e})') from e


def open_image(path, mode=None):
    """A decoded, upright picture, converted to a mode if one is given; 16-bit grey becomes 8-bit, a
    palette with transparent colours RGBA.

    Errors: no image, a broken one, one of too many pixels, numbers that would end as black.
    """
    with opened(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f'{image.width} x {image.height} pixels are too many; reduce it')
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in 'IF':
            v = np.asarray(image)
            if image.mode == 'F' or v.min() < 0 or not 4096 <= v.max() <= 65535:    # 12 bits, say
                raise ValueError(f'values of {v.min():g} to {v.max():g} are not 16-bit; scale all '
                                 'pictures by one factor to whole numbers of 0 to 65535')
            image = Image.fromarray((v // 257).astype('uint8'))
        if image.mode == 'P' and image.has_transparency_data:
            image = image.convert('RGBA')
        return image.convert(mode) if mode else image.copy()


def read_square(path, size, mode='RGB'):
    """Centre square of an image file, reduced to size x size -> uint8 array (size, size[, 3])."""
    image = open_image(path, mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    how = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    return np.array(image.resize((size, size), how, box=(left, top, left + side, top + side)))


def decode(out, ends, read):
    """Fills out (N, ...) by several threads: read(i) are the arrays up to ends[i]. Tells how far it
    is."""
    def fill(i):
        out[ends[i - 1] if i else 0:ends[i]] = read(i)
    began = last = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:            # more only fill the memory
        for n, _ in enumerate(pool.map(fill, range(len(ends))), 1):
            if time.monotonic() - last > 5 and n < len(ends):
                last = time.monotonic()
                print(f'{n} of {len(ends)} images decoded, '
                      f'{(last - began) / n * (len(ends) - n):.0f} s left', flush=True)


def cached(cache, files, shape, read, rows=None, key=()):
    """The arrays read(i), uint8 of a shape, for all i below len(files) -> tensor (N, *shape); with
    rows, a function that gives the number of arrays in each file, read(i) is so many.

    With `cache`, a folder, they are decoded once, into a file that is mapped into memory: later
    starts read nothing, and no run needs its size in memory. Its name is a hash of key and of the
    files' paths, sizes and times, so that what has changed is decoded again. Errors: no room for it
    on the disk.
    """
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    name = hashlib.sha256(repr((shape, stats, *key)).encode(errors='surrogateescape')).hexdigest()
    path = Path(cache) / f'{name[:32]}.npy' if cache else None
    while cache and int(os.environ.get('LOCAL_RANK', 0)) and not path.exists():
        time.sleep(.05)             # of a machine's processes under torchrun the first decodes
    if not cache or not path.exists():
        ends = np.cumsum(rows() if rows else [1] * len(files)).tolist()
    if not cache:
        out = np.empty((ends[-1], *shape), np.uint8)
        decode(out, ends, read)
        return torch.from_numpy(out)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        need = ends[-1] * math.prod(shape)
        if shutil.disk_usage(path.parent).free < need:      # a full disk would kill the process
            raise ValueError(f'{path.parent}: no room for {need / 2 ** 20:.0f} MiB of decoded '
                             'images; use a smaller --size or --clean, or another --out')
        part = path.with_suffix(f'.{os.getpid()}.tmp')
        try:
            out = np.lib.format.open_memmap(part, 'w+', np.uint8, (ends[-1], *shape))
            decode(out, ends, read)
            out.flush()
            del out                                         # Windows renames no open file
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):              # done, or still open on Windows
                part.unlink()
    return torch.from_numpy(np.load(path, mmap_mode='c'))


def read_squares(files, size, cache=None):
    """Image files -> uint8 tensor (N, 3, size, size)."""
    return cached(cache, files, (3, size, size),
                  lambda i: read_square(files[i], size).transpose(2, 0, 1))


FACE_PARTS = ('skin', 'nose', 'eye_g', 'l_eye', 'r_eye', 'l_brow', 'r_brow', 'mouth', 'u_lip',
              'l_lip')


def celeba_hole(root, index, size):
    """Hole of CelebAMask-HQ's image `index`: the union of the face's parts -> bool (size, size)."""
    covered = np.zeros((size, size))
    for part in FACE_PARTS:
        path = root / 'CelebAMask-HQ-mask-anno' / str(index // 2000) / f'{index:05d}_{part}.png'
        if path.exists():                                           # an absent part has no file
            covered += read_square(path, size, 'L')     # summed: two parts may share a pixel
    return covered >= 128


def celeba_mask_hq(root, size, pairs, measurements, clean, test, seed, images=None, validation=0,
                   cache=None):
    """CelebAMask-HQ in its own layout, with more clean images from a folder, as a Split.

    In one fixed random order of the data set: test images, `validation` ones that stand in for
    them (for choosing hyper-parameters), clean ones where `images` does not suffice; the rest is
    shuffled by the seed into pairs and measurements. Errors: another layout, too few images.
    """
    root = Path(root)
    folder = root / 'CelebA-HQ-img'
    if not folder.is_dir() or not (root / 'CelebAMask-HQ-mask-anno').is_dir():
        raise ValueError(f'{root}: not CelebAMask-HQ: needs the folders CelebA-HQ-img and '
                         'CelebAMask-HQ-mask-anno')
    numbers = sorted(int(f.stem) for f in image_files(folder) if f.stem.isdigit())
    masks = {int(f.stem[:5]): f for f in (root / 'CelebAMask-HQ-mask-anno').rglob('*_skin.png')}
    for i in masks.keys() - set(numbers):
        raise ValueError(f'{masks[i]}: a mask without an image in {folder}')
    more = image_files(images)[:clean] if images else []
    sizes = [test, validation, clean - len(more), pairs + measurements]
    if sum(sizes) > len(numbers):
        raise ValueError(
            f'{root}: holds {len(numbers)} images, and --images {len(more)}; --pairs {pairs} '
            f'--measurements {measurements} --clean {clean} --test {test} need {sum(sizes)} here')
    order = np.random.default_rng(0).permutation(numbers)
    test_ids, val_ids, clean_ids, rest = np.split(order, np.cumsum(sizes[:3]))
    rest = np.random.default_rng(1 + seed).permutation(rest)[:pairs + measurements]

    def files(ids):
        return [folder / f'{i}.jpg' for i in ids]

    def load(ids):
        hole = cached(cache, [masks.get(i, folder) for i in ids], (1, size, size),
                      lambda k: celeba_hole(root, ids[k], size)[None])
        return read_squares(files(ids), size, cache), hole.bool()

    x, hole = load(rest)
    y = punch_hole(x, hole)
    test_x, test_hole = load(val_ids if validation else test_ids)
    unpaired = read_squares(files(clean_ids) + more, size, cache)
    return Split(x[:pairs], y[:pairs], y[pairs:], x[pairs:], unpaired,
                 test_x, punch_hole(test_x, test_hole), test_hole)


# Folders of pictures of any size: training crops at full resolution, tests on whole images.
MOST_CROPPED = 2 ** 26          # pixels of a folder's crops together, if one of each is not more


def reduced(width, height, short_side):
    """Width and height of a picture whose shorter side is brought down to short_side, if given."""
    side = min(width, height)
    if not short_side or side <= short_side:
        return width, height
    return tuple(max(short_side, round(n * short_side / side)) for n in (width, height))


def read_rgb(path, grey=None):
    """A picture in RGB. Errors: one in grey where `grey` is False, in colour where it is True."""
    image = open_image(path)
    if grey is not None and (image.mode in ('1', 'L', 'LA', 'La')) != grey:
        raise ValueError(f'{path}: {"in colour" if grey else "grey"}, but --channels '
                         f'{1 if grey else 3} needs {"grey" if grey else "colour"} images')
    return image.convert('RGB')


def whole_tensor(image, path, size, short_side):
    """A picture -> uint8 (3, H, W), reduced to `short_side` if that is given and smaller. Errors:
    then it is less than size x size."""
    if reduced(*image.size, short_side) != image.size:
        image = image.resize(reduced(*image.size, short_side), Image.Resampling.BOX)
    if min(image.size) < size:
        raise ValueError(f'{path}: {image.width} x {image.height} is less than the training crops; '
                         f'use a --size below {size}')
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_whole(path, size, short_side=0, grey=None):
    """An image file -> uint8 (3, H, W), as `whole_tensor` makes it of what `read_rgb` reads."""
    return whole_tensor(read_rgb(path, grey), path, size, short_side)


def read_pair(x, y, size, short_side=0, grey=None):
    """Files of a true image and its measurement -> two like uint8 (3, H, W); a border that only
    the true image has is cut off, then both are reduced. Errors: any other difference of sizes."""
    u, v = (read_rgb(f, grey) for f in (x, y))
    more = [a - b for a, b in zip(u.size, v.size)]
    if min(more) < 0 or max(more) > .1 * max(u.size):
        raise ValueError(f'{y}: {v.width} x {v.height}, but {x} is {u.width} x {u.height}; '
                         'bring both to one size')
    i, j = (m // 2 for m in more)
    u = u.crop((i, j, i + v.width, j + v.height))
    return [whole_tensor(image, f, size, short_side) for image, f in ((u, x), (v, y))]


def crops_of_files(groups, size, seed, short_side, cache, grey=None):
    """Random crops of pictures, decoded once. A group is one file, (x,), or a pair, (x, y), which
    is cut at the same places -> for each side of the groups a uint8 tensor (N, 3, size, size)."""
    sides, files = len(groups[0]), [f for group in groups for f in group]
    most = MOST_CROPPED // (size ** 2 * len(groups))

    def number(width, height):              # as many as would tile a picture
        return max(1, min(most, (width // size) * (height // size)))

    def rows():
        numbers = []
        for *_, f in groups if most > 1 else ():
            with opened(f) as image:
                numbers.append(number(*reduced(*image.size, short_side)))
        return numbers or [1] * len(groups)

    def read(i):
        how = size, short_side, grey
        whole = read_pair(*groups[i], *how) if sides == 2 else [read_whole(*groups[i], *how)]
        rng, (H, W) = np.random.default_rng([seed, i]), whole[0].shape[1:]
        out = np.empty((number(W, H), 3 * sides, size, size), np.uint8)
        for crop in out:
            top, left = rng.integers(H - size + 1), rng.integers(W - size + 1)
            crop[:] = torch.cat([u[:, top:top + size, left:left + size] for u in whole])
        return out
    return cached(cache, files, (3 * sides, size, size), read, rows,
                  (seed, short_side, grey, most)).split(3, 1)


def scored(pairs, size):
    """Pairs of like (3, H, W) -> their two sides as a Split has them: tensors (N, 3, size, size)
    if all are of that size, which are scored in batches, or lists."""
    sides = [list(side) for side in zip(*pairs)]
    small = all(u.shape[1:] == (size, size) for u in sides[1])
    return [torch.stack(side) for side in sides] if small else sides


def haze_folders(root, size, pairs, measurements, clean, test, seed, images=None, validation=0,
                 short_side=0, cache=None):
    """O-HAZE, I-HAZE or RESIDE SOTS as they come: folders `hazy` beside `GT`, `gt` or `clear`.

    The name up to the first _ is the scene; no scene serves twice. In a fixed order: scenes of the
    test images, of `validation` ones; the rest shuffled by the seed: one image each of `pairs`
    scenes, measurements, clean images. Sizes count images. Errors: another layout, too few images.
    """
    scenes = {}
    for hazy in sorted(f for f in Path(root).rglob('*') if f.is_dir() and f.name.lower() == 'hazy'):
        for clear in hazy.parent.iterdir():
            if clear.is_dir() and clear.name.lower() in ('gt', 'clear'):
                files = image_files(hazy)
                for f in image_files(clear):
                    name = f.stem.split('_')[0]
                    views = [h for h in files if h.stem.split('_')[0] == name]
                    if views:
                        scenes[clear, name] = (f, views)
    if not scenes:
        raise ValueError(f'{root}: no folder hazy beside a folder GT, gt or clear in it, '
                         'with names that match up to the first _')
    order = np.random.default_rng(0).permutation(len(scenes)).tolist()
    scenes, left = list(scenes.values()), order

    def take(n, views=None):
        """Pairs of files of so many whole scenes that they hold n images, cut to n."""
        out = []
        while len(out) < n and left:
            x, hazy = scenes[left.pop(0)]
            out += [(x, y) for y in hazy[:views]]
        if len(out) < n:
            raise ValueError(f'{root}: {len(scenes)} scenes are too few for --test {test} --pairs '
                             f'{pairs} --measurements {measurements} --clean {clean}')
        return out[:n]

    tests, stand_in = take(test), take(validation)
    left = np.random.default_rng(1 + seed).permutation(left).tolist()
    few, many = take(pairs, views=1), take(measurements)
    more = image_files(images)[:clean] if images else []
    unpaired = [(x,) for x, _ in take(clean - len(more), views=1)] + [(x,) for x in more]

    def cut(groups):
        return crops_of_files(groups, size, seed, short_side, cache)
    pictures = (read_pair(*files, size, short_side) for files in stand_in or tests)
    return Split(*cut(few), *cut(many)[::-1], *cut(unpaired), *scored(pictures, size))


def custom_folders(root, size, pairs, measurements, clean, test, seed, images=None,
                   short_side=0, grey=False, cache=None):
    """A user's folders paired/x, paired/y, measurements, images, and perhaps test/x, test/y.

    Paths below x and y without their endings pair them; sizes are at most. Without a test folder
    test_x is None, test_y holds crops of the measurements. Errors: what is missing or does not
    fit, by name.
    """
    root, rng = Path(root), np.random.default_rng(seed)

    def named(below):
        names = {}
        for f in image_files(below):
            name = str(f.relative_to(below).with_suffix(''))
            if names.setdefault(name, f) != f:
                raise ValueError(f'{f}: has the name of {names[name]}; pairs go by names')
        return names

    def matched(folder, most):
        xs, ys = named(root / folder / 'x'), named(root / folder / 'y')
        for one, other, side in ((xs, ys, 'y'), (ys, xs, 'x')):
            for name in sorted(one.keys() - other.keys()):
                raise ValueError(f'{one[name]}: has no partner in {root / folder / side}; pairs go '
                                 'by names')
        names = sorted(xs) if folder == 'test' else rng.permutation(sorted(xs)).tolist()
        return [(xs[n], ys[n]) for n in names[:most]]

    def single(files, most):
        return [(f,) for f in rng.permutation(files)[:most].tolist()]

    def cut(groups):
        return crops_of_files(groups, size, seed, short_side, cache, grey)
    few = cut(matched('paired', pairs))
    many, = cut(single(image_files(root / 'measurements'), measurements))
    clean_files = image_files(root / 'images') + (image_files(images) if images else [])
    unpaired, = cut(single(clean_files, clean))
    tests = None, many[:64]
    if (root / 'test').exists():
        pictures = (read_pair(*files, size, short_side, grey) for files in matched('test', test))
        tests = scored(pictures, size)
    return Split(*few, many, None, unpaired, *tests)
