"""The emoji that the tokenizer learns as tokens of their own, and the words each one starts from.

The backbone's vocabulary predates emoji: unknown ones would become [UNK], together with any word written
directly beside them. Each gets a row in the embedding table that starts as the mean of its words' rows.
"""

POSITIVE = {
    "😀": "happy smile", "😁": "happy grin", "😂": "funny laugh", "🤣": "funny laugh", "😃": "happy smile",
    "😄": "happy smile", "😅": "relief laugh", "😆": "funny laugh", "😇": "good angel", "😉": "wink smile",
    "😊": "happy smile", "😋": "delicious", "😌": "relief calm", "😍": "love", "😎": "cool", "😘": "love kiss",
    "😗": "kiss", "😙": "kiss smile", "😚": "love kiss", "🙂": "smile", "🤗": "hug love", "🤩": "amazing star",
    "🥰": "love", "🥳": "celebrate party", "☺": "happy smile", "😸": "happy cat", "😻": "love cat",
    "👍": "good yes", "👌": "perfect okay", "👏": "bravo applause", "🙌": "celebrate praise", "🙏": "thanks",
    "💪": "strong", "🤝": "deal agree", "✌": "peace", "🤘": "rock", "🫶": "love", "💯": "perfect hundred",
    "❤": "love heart", "🧡": "love heart", "💛": "love heart", "💚": "love heart", "💙": "love heart",
    "💜": "love heart", "🖤": "love heart", "🤍": "love heart", "💕": "love", "💖": "love", "💗": "love",
    "💓": "love", "💞": "love", "💘": "love", "💝": "love gift", "💐": "flowers", "🌹": "rose", "🌸": "flower",
    "🌟": "star great", "⭐": "star great", "✨": "magic shine", "🎉": "celebrate party", "🎊": "celebrate",
    "🏆": "winner best", "🥇": "winner first", "🔥": "hot great", "🚀": "fast great", "☀": "sun", "🌈": "rainbow",
    "✅": "yes good", "🍀": "luck", "😏": "smirk", "🤤": "delicious", "🎁": "gift", "🎂": "birthday cake",
}  # fmt: skip

NEGATIVE = {
    "😞": "disappointed sad", "😟": "worried", "😠": "angry", "😡": "furious", "🤬": "furious swearing",
    "😢": "sad cry", "😣": "struggle pain", "😤": "angry", "😥": "sad", "😦": "upset", "😧": "upset",
    "😨": "afraid", "😩": "tired awful", "😪": "tired", "😫": "tired awful", "😭": "sad cry", "😰": "afraid",
    "😱": "horror scream", "😒": "annoyed", "😓": "stress", "😔": "sad", "😕": "confused", "😖": "frustrated",
    "🙁": "sad", "☹": "sad", "🥺": "pleading sad", "😑": "annoyed", "😐": "meh", "🙄": "annoyed whatever",
    "😬": "awkward", "😵": "dizzy", "🤢": "sick disgust", "🤮": "sick disgust", "🤒": "sick", "🤕": "hurt",
    "🥱": "boring", "😴": "boring sleep", "🤦": "stupid", "🤷": "whatever", "👎": "bad no", "💔": "broken heart",
    "💩": "crap", "🤡": "clown stupid", "🗑": "trash", "🚮": "trash", "❌": "wrong no", "⛔": "no stop",
    "🚫": "no", "💀": "dead", "☠": "dead", "👿": "angry evil", "😈": "evil", "🤥": "lie", "😾": "angry cat",
    "😿": "sad cat", "🖕": "hate", "⚠": "warning", "🥀": "sad", "😳": "shock", "🤯": "shock", "😲": "shock",
}  # fmt: skip

WORDS = POSITIVE | NEGATIVE
