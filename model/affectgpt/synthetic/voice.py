"""Speak nonsense syllables with a chosen tone of voice: glottal harmonics, moving formants, breath; 16 kHz mono."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
_CONTROL_RATE = 200  # contour values per second
_HOP = SAMPLE_RATE // _CONTROL_RATE

TONE = (
    "pitch",  # semitones above the speaker's base pitch
    "pitch_range",  # semitones (standard deviation) of the accents
    "pitch_slope",  # semitones gained from the first to the last syllable
    "tempo",  # syllables a second
    "effort",  # −1 soft (steep spectrum) … +1 pressed (flat spectrum): loudness that survives normalisation
    "roughness",  # 0 … 1, jitter and shimmer of the pulses
    "breath",  # 0 … 1, aspiration noise
    "tremor",  # semitones of a 6 Hz shake
)
"""Parameters of a tone of voice."""

REST: dict[str, float] = {
    "pitch": 0.0,
    "pitch_range": 1.2,
    "pitch_slope": -1.5,
    "tempo": 4.0,
    "effort": 0.0,
    "roughness": 0.08,
    "breath": 0.15,
    "tremor": 0.0,
}
"""Tone of a matter-of-fact sentence."""

_VOWELS = np.array([[730, 1090, 2440], [530, 1840, 2480], [300, 2200, 2900], [570, 840, 2410], [320, 870, 2240]], float)
"""First three formants (Hz) of a, e, i, o, u, as measured by Peterson and Barney (1952) for men, rounded."""
_BANDWIDTHS = np.array([80.0, 110.0, 160.0])


@dataclass(frozen=True)
class Speaker:
    """A speaker: base pitch in Hz, vocal-tract scale of the formants, and relative level of the room's noise."""

    base_pitch: float
    tract: float
    room: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> Speaker:
        return cls(rng.uniform(140, 190), rng.uniform(0.95, 1.2), 10 ** rng.uniform(-2.7, -1.9))


def speak(tone: Mapping[str, float], who: Speaker, seconds: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Synthesise a voice-like signal `[seconds · 16000]` in −1…1 with a tone (keys of `TONE`).

    The source is a sum of harmonics of the pitch contour, whose amplitudes fall with frequency at a rate set by
    `effort`; formant resonances weight them, so no filter has to run and nothing aliases.
    """
    steps = round(seconds * _CONTROL_RATE)
    at = np.arange(steps + 1) / _CONTROL_RATE
    loudness, formants, pitch = _syllables(tone, who, at, seconds, rng)
    pitch = pitch + tone["tremor"] * np.sin(2 * np.pi * 6.0 * at + rng.uniform(0, 6.28))
    pitch = pitch + 1.6 * tone["roughness"] * rng.normal(size=len(at))
    shimmer = 1 + 0.5 * tone["roughness"] * rng.normal(size=len(at))
    hertz = who.base_pitch * 2 ** ((tone["pitch"] + pitch) / 12)

    phase = 2 * np.pi * np.cumsum(_upsample(hertz)) / SAMPLE_RATE
    turn = np.exp(1j * phase).astype(np.complex64)
    harmonic, voiced = np.ones_like(turn), np.zeros(len(turn), np.float32)
    falloff = 1.35 - 0.65 * tone["effort"]
    for k in range(1, int(min(40, 5000 / hertz.min())) + 1):
        harmonic = harmonic * turn
        gain = _resonance(k * hertz, formants) * k**-falloff * (k * hertz < 6500)
        voiced += _upsample((gain * loudness * shimmer).astype(np.float32)) * harmonic.imag
    voiced /= np.sqrt(np.mean(voiced**2)) + 1e-9

    spectrum = np.fft.rfft(rng.normal(size=len(voiced)))
    frequency = np.fft.rfftfreq(len(voiced), 1 / SAMPLE_RATE)
    hiss = np.fft.irfft(spectrum * np.exp(-(((frequency - 3000) / 2200) ** 2)), len(voiced))
    hiss = hiss / hiss.std() * _upsample(loudness)
    signal = voiced + 0.6 * tone["breath"] * hiss + who.room * 3 * rng.normal(size=len(voiced))
    return (0.6 * signal / np.abs(signal).max()).astype(np.float32)


def _upsample(contour: NDArray) -> NDArray:
    """Interpolate a contour at the control rate, `[steps + 1]`, linearly to samples `[steps · 80]`, same dtype."""
    u = np.arange(_HOP, dtype=contour.dtype) / _HOP
    return (contour[:-1, None] + np.diff(contour)[:, None] * u).ravel()


def _syllables(
    tone: Mapping[str, float], who: Speaker, at: NDArray[Any], seconds: float, rng: np.random.Generator
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Draw contours at the control rate: loudness `[m]`, formants (Hz) `[m, 3]`, accents + slope (semitones) `[m]`."""
    loudness, pitch = np.zeros_like(at), np.zeros_like(at)
    vowels, starts, accents = [], [], []
    clock = rng.uniform(0.05, 0.15)
    while clock < seconds - 0.1:
        length = np.clip(rng.normal(1, 0.12), 0.7, 1.3) / tone["tempo"]
        inside = (at >= clock) & (at < clock + length)
        u = (at[inside] - clock) / length
        loudness[inside] = rng.uniform(0.7, 1.0) * np.sin(np.pi * np.clip(u / 0.9, 0, 1)) ** 0.7
        vowels.append(_VOWELS[rng.integers(len(_VOWELS))] * who.tract)
        starts.append(clock + length / 2)
        accents.append(tone["pitch_range"] * rng.normal())
        clock += length
    pitch = np.interp(at, starts, np.array(accents) - np.mean(accents)) + tone["pitch_slope"] * (at / seconds - 0.5)
    formants = np.stack([np.interp(at, starts, [v[i] for v in vowels]) for i in range(3)], axis=1)
    return loudness, formants, pitch


def _resonance(hertz: NDArray[Any], formants: NDArray[Any]) -> NDArray[Any]:
    """Compute the gain of three parallel resonances at `hertz` `[m]`."""
    detuning = (hertz[:, None] - formants) / _BANDWIDTHS
    return (np.array([1.0, 0.6, 0.35]) / np.sqrt(1 + detuning**2)).sum(axis=1) + 0.02
