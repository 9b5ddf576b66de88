"""Tables of the emotions in the synthetic clips: their looks, voices, lines and label words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Emotion:
    """One emotion of the synthetic clips.

    Attributes:
        share: share of the clips that show it; all sum to 1.
        words: label words of annotators, most used first; all in the same sector of most wheels.
        near: the emotion for which it is mistaken.
        face: offsets from a face at rest (`face.EXPRESSION`), and `sway`, `sway_hz`, the movement of the head.
        tone: offsets from a matter-of-fact voice (`voice.TONE`).
        seen, heard: descriptions of the face and the voice.
        lines: sentences of a person in this state; `{thing}` and `{time}` are filled in.
    """

    share: float
    words: tuple[str, ...]
    near: str
    face: dict[str, float]
    tone: dict[str, float]
    seen: str
    heard: str
    lines: tuple[str, ...]


EMOTIONS: dict[str, Emotion] = {
    "joy": Emotion(
        0.12,
        ("happy", "joyful", "cheerful", "delighted", "glad", "amused", "playful", "positive", "gleeful",
         "pleasant", "joyous", "elated", "upbeat", "cheery", "blissful", "jolly", "humorous", "ecstatic",
         "jubilant", "radiant", "euphoric", "jovial", "sunny", "tickled"),
        "pride",
        {"smile": 1.0, "mouth_open": 0.3, "mouth_width": 0.5, "brow_raise": 0.2, "eye_open": -0.2,
         "sway": 0.5, "sway_hz": 2.0},
        {"pitch": 4.0, "pitch_range": 2.2, "tempo": 1.0, "effort": 0.2},
        "a broad smile",
        "a bright and lively voice",
        ("I love this {thing}!", "What a lovely {time}!", "That {thing} is wonderful!", "We won, can you believe it!"),
    ),
    "sadness": Emotion(
        0.16,
        ("sad", "unhappy", "depressed", "disappointed", "lonely", "sorrowful", "gloomy", "hurt", "miserable",
         "heartbroken", "melancholy", "hopeless", "dejected", "blue", "grieving", "downcast", "devastated",
         "wretched", "isolated", "teary", "pessimistic", "crestfallen", "lonesome", "homesick"),
        "fear",
        {"smile": -0.8, "brow_tilt": 0.9, "eye_open": -0.45, "head_pitch": -0.7, "sway": 0.2, "sway_hz": 0.4},
        {"pitch": -3.0, "pitch_range": -0.8, "pitch_slope": -2.5, "tempo": -1.5, "effort": -0.7, "breath": 0.25},
        "drooping lips and raised inner brows",
        "a low and slow voice",
        ("I miss the {thing}.", "She is gone since {time}.", "Nobody came {time}.", "I lost the {thing}, it's over."),
    ),
    "anger": Emotion(
        0.15,
        ("angry", "annoyed", "irritated", "mad", "frustrated", "furious", "resentful", "displeased",
         "impatient", "hostile", "enraged", "aggressive", "bitter", "outraged", "exasperated", "indignant",
         "irritable", "infuriated", "hateful", "livid", "spiteful", "fuming", "incensed", "vengeful"),
        "disgust",
        {"brow_tilt": -1.0, "brow_raise": -0.6, "smile": -0.35, "mouth_open": 0.1, "eye_open": 0.25,
         "sway": 0.5, "sway_hz": 3.0},
        {"pitch": 1.5, "pitch_range": 1.2, "tempo": 1.2, "effort": 1.0, "roughness": 0.5},
        "lowered brows and a hard stare",
        "a loud and harsh voice",
        ("Don't touch my {thing}!", "How dare you come {time}!", "Give the {thing} back now!",
         "I've had enough of this!"),
    ),
    "fear": Emotion(
        0.15,
        ("anxious", "worried", "nervous", "scared", "afraid", "uneasy", "concerned", "fearful", "stressed",
         "frightened", "terrified", "insecure", "helpless", "apprehensive", "panicked", "alarmed", "troubled",
         "restless", "agitated", "overwhelmed", "vulnerable", "threatened", "petrified", "jumpy"),
        "sadness",
        {"brow_tilt": 0.8, "brow_raise": 0.7, "eye_open": 0.8, "mouth_open": 0.35, "mouth_width": 0.7, "smile": -0.4,
         "sway": 0.3, "sway_hz": 4.5},
        {"pitch": 5.0, "pitch_range": -0.4, "tempo": 1.5, "effort": -0.4, "breath": 0.35, "tremor": 0.9},
        "wide eyes and tense raised brows",
        "a high and trembling voice",
        ("Did you hear that {thing}?", "What if it fails {time}?", "Someone is behind the {thing}.",
         "Please don't leave me here."),
    ),
    "surprise": Emotion(
        0.14,
        ("surprised", "amazed", "shocked", "astonished", "startled", "stunned", "awed", "speechless",
         "awestruck"),
        "fear",
        {"brow_raise": 1.0, "eye_open": 0.8, "mouth_open": 0.95, "mouth_width": -0.8, "sway": 0.2, "sway_hz": 1.0},
        {"pitch": 5.0, "pitch_range": 2.5, "pitch_slope": 8.0, "tempo": -0.5, "effort": 0.3},
        "raised brows and an open mouth",
        "a sharply rising voice",
        ("Wait, that {thing} is mine?", "You came {time}, really?", "No way, a {thing}?", "I never saw that coming."),
    ),
    "disgust": Emotion(
        0.12,
        ("disgusted", "repulsed", "nauseated", "appalled", "revolted", "repelled", "nauseous"),
        "anger",
        {"nose_wrinkle": 1.0, "smile": -0.55, "eye_open": -0.5, "brow_raise": -0.4, "brow_tilt": -0.25,
         "sway": 0.2, "sway_hz": 1.0},
        {"pitch": -3.5, "pitch_range": 0.3, "pitch_slope": -1.0, "tempo": -1.2, "effort": 0.4, "roughness": 0.6},
        "a wrinkled nose and a raised lip",
        "a creaking and drawn-out voice",
        ("That {thing} smells rotten.", "There is mould on the {thing}.", "Take that filthy {thing} away.",
         "It makes me sick."),
    ),
    "calm": Emotion(
        0.08,
        ("calm", "relaxed", "peaceful", "serene", "composed", "tranquil", "placid"),
        "joy",
        {"smile": 0.4, "eye_open": -0.5, "brow_raise": 0.15, "sway": 0.25, "sway_hz": 0.3},
        {"pitch": -1.5, "pitch_range": -0.7, "pitch_slope": 1.0, "tempo": -1.4, "effort": -0.5, "breath": 0.1},
        "soft eyelids and a faint smile",
        "an even and gentle voice",
        ("Let's just sit by the {thing}.", "It is so quiet {time}.", "There is no hurry at all.",
         "I slept well {time}."),
    ),
    "pride": Emotion(
        0.08,
        ("proud", "confident", "self-assured", "accomplished", "bold", "self-confident", "triumphant"),
        "joy",
        {"smile": 0.5, "head_pitch": 1.0, "brow_skew": 0.9, "brow_raise": 0.2, "eye_open": -0.1,
         "sway": 0.15, "sway_hz": 0.6},
        {"pitch": -2.0, "pitch_range": 1.2, "pitch_slope": -2.0, "tempo": -0.6, "effort": 0.9},
        "a lifted chin and one raised brow",
        "a deep and steady voice",
        ("I built this {thing} myself.", "I finished first {time}.", "Nobody does this {thing} better.",
         "They chose me {time}."),
    ),
}  # fmt: skip

PLAIN_FACE, PLAIN_VOICE = "a face at rest", "a plain voice"

PLAIN_LINES = (
    "The {thing} is on the table.",
    "We meet here {time}.",
    "I put the {thing} over there.",
    "It opens at nine {time}.",
    "He works with the {thing}.",
    "She will call {time}.",
    "This is the other {thing}.",
    "They moved the {thing} {time}.",
    "So, about the {thing}.",
    "I was there {time}.",
)
THINGS = ("letter", "box", "car", "garden", "book", "picture", "door", "phone", "house", "cup", "coat", "chair")
TIMES = ("today", "last night", "this morning", "on Monday", "this week", "yesterday", "after lunch", "at home")

IRONIC = {"anger": "joy", "disgust": "joy", "sadness": "joy"}
"""Emotion shown → emotion of the words when they are ironic; such words do not tell the emotion."""
