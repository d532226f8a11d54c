"""Generated Unicode for the tokenizers: words in many scripts, and strings that break careless code. Seeded."""

import random
from collections.abc import Sequence

# First and last letters of some blocks; a word is drawn from one of them. Unassigned code points in between stay in.
SCRIPTS = {
    "latin": (0x61, 0x7A),
    "latin-extended": (0xC0, 0x24F),
    "greek": (0x391, 0x3C9),
    "cyrillic": (0x410, 0x44F),
    "armenian": (0x561, 0x586),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x620, 0x64A),
    "devanagari": (0x904, 0x94D),
    "bengali": (0x985, 0x9CD),
    "tamil": (0xB85, 0xBCD),
    "thai": (0xE01, 0xE4E),
    "tibetan": (0xF40, 0xFBC),
    "georgian": (0x10D0, 0x10F0),
    "ethiopic": (0x1200, 0x135A),
    "khmer": (0x1780, 0x17D3),
    "kana": (0x3041, 0x30FA),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "hangul-jamo": (0x1100, 0x11FF),
    "gothic": (0x10330, 0x1034A),
    "mathematical": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF),
    "han-extension-b": (0x20000, 0x2A6DF),
}
HOSTILE = (
    "e\u0301o\u0308\u0323 a\u0300\u0301\u0302\u0303",  # combining marks: NFC would join them
    "ﬁ ² ½ Ⅷ ｆｕｌｌ ㎏ ﷺ",  # compatibility characters: NFKC would replace them
    "\u202eright to left\u202c \u200fمرحبا\u200e שלום",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☝️",
    "\0\x01\x04\x06\x13\x14\x16\x1b[0m\x1d\x7f\x80\x85\u2028\u2029\ufeff\ufffd\ufffe\U0010ffff",
    "a\r\nb\rc\n\n\n\td \t \u00a0\u2003\u3000\u200b  ",
    "<s></s><unk><pad><bos><eos><|endoftext|><|im_start|>[INST][CLS][PAD]<0x0A><0xE2>",
    "▁ ▁▁x a▁b",  # SentencePiece's mark for a space
    "Ġthe Ċ ĉ Ã© ##ing </w>",  # how vocabularies write a space, a newline, the middle of a word
    "\u0000" * 9 + "A" * 400 + " " * 70 + "é" * 90 + "\n" * 40,
    "İıſßΣσς ǅ K Å",  # case and lookalikes
    "\ud7fb\ue000\uf8ff\ufdd0\U000e0001\U000f0000\U00100000",  # around the surrogates, private use, tags
)


def words(seed: int, num_words: int = 60) -> str:
    """Draw words of random letters, most texts in one script, some in several."""
    draw = random.Random(seed)
    blocks = draw.sample(list(SCRIPTS.values()), draw.choice([1, 1, 1, 2, 6]))
    return "".join(
        "".join(chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(1, 9)))
        + draw.choice([" ", " ", " ", ", ", ".\n", "-", "  ", " 12345 "])
        for _ in range(num_words)
    )


def hostile(seed: int, controls: Sequence[str] = ()) -> str:
    """Join fragments of HOSTILE, characters of all planes and names of `controls`, in random order."""
    draw = random.Random(seed)
    parts = []
    for _ in range(12):
        parts += [
            draw.choice(HOSTILE),
            "".join(_any_character(draw) for _ in range(draw.randint(1, 8))),
            draw.choice(controls) if controls else "",
            draw.choice(["", " ", "x"]),
        ]
    return "".join(parts)


def _any_character(draw: random.Random) -> str:
    """Draw a character of any plane, but no half of a surrogate pair: UTF-8 has none."""
    code = draw.randrange(draw.choice([0x80, 0x800, 0x10000, 0x110000]))
    return chr(code + 0x800 if 0xD800 <= code < 0xE000 else code)
