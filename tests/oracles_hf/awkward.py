"""Texts and conversations on which tokenizers and chat templates tend to differ."""

TEXTS = [
    "",
    " ",
    "   three spaces before and two behind  ",
    "In 1984, 3.14159 + 2024 = 2027.14159; ¾ of ⅷ ² is ٣٤",
    "It's DON'T we'LL they're I'm",
    "你好,世界。日本語のテキスト 한국어",
    "😀 👩\u200d👩\u200d👧 🧑🏽\u200d🚀 🇫🇷!",
    "a\n\n\nb\r\nc\td\n  e\n\n    f",
    "naïve café cafe\u0301 ﬁn Ω ½",
    "<b>bold</b> & \"quotes\" 'single' `code` \\n {{ x }} {% if %}",
    "\u00a0non-breaking\u2003em\u200bzero\ufeff",
    "hello" * 5 + " " + "x" * 40,
    "def f(x):\n    return x ** 2  # ¿qué?\n",
    "ᚠᛇᚻ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 ﷽ \U0010fffe",
    "▁ and Ġ are letters here",
]

CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  1 + 1 = ¾?"},
        {"role": "assistant", "content": "No: 2. 😀"},
    ],
    [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": " Hello! \n\nHow are you?"},
        {"role": "user", "content": "Fine & <well>,\nthanks"},
        {"role": "assistant", "content": "Bye 2024"},
    ],
]
