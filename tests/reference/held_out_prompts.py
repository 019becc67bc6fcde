"""Eighteen prompts written for this project, for SmolLM2's goldens; nothing is trained or tuned on them.

Short and long ones alternate, so that any six in a row make a ragged batch. One was reworded because its two best
tokens once lay within 5e-6 of max |logit|, close to where float32 itself errs (2e-6): either is a right answer there.
"""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "Why do cats purr?",
    "Summarise this paragraph in two sentences. The old lighthouse at Corran Point had not been lit for thirty years "
    "when the council voted to sell it. A retired engineer and her sister bought it for the price of a small car, "
    "with the promise that the lamp room would stay open to visitors. They spent two winters scraping rust from the "
    "stairs, rewiring the lower floors and cleaning the great glass lens, which had to be carried down in forty "
    "numbered pieces. In the third spring, fishermen coming home late saw the beam sweep over the bay again, and "
    "several of them rang the harbour office to ask which ship was on fire. The sisters now sell tea in the keeper's "
    "kitchen, and on foggy nights they let children ring the bell.",
    "What is 17 + 26?",
    "Write a Python function `is_palindrome(text)` that ignores case, spaces and punctuation. Include a docstring "
    "and three example calls.",
    "List five things to pack for a weekend of camping in the rain.",
    "Complete this code:\n\ndef running_mean(values, window):\n    total = 0.0\n    means = []\n    for i, value in "
    "enumerate(values):\n        total += value\n        if i >= window:\n            total -= values[i - window]\n",
    "Translate to French: The train leaves at half past seven.",
    'Return only JSON with the keys "name", "colour" and "price" for this sentence: The green kettle from '
    "Aldo's shop costs 24 euros.",
    "Hello!",
    "A farmer has 48 eggs. She keeps a quarter of them and packs the rest in boxes of six. How many boxes does she "
    "fill? Show each step.",
    "Tell me a short story about a clockmaker who is afraid of silence.",
    "You are helping a new colleague. Explain, in plain words and without jargon, the difference between a process "
    "and a thread in an operating system. Use an everyday comparison such as a kitchen with several cooks, say when "
    "each of them is the better choice, name one thing that goes wrong when two threads change the same data at the "
    "same time, and finish with a single sentence that a busy person could remember. Keep the whole answer under two "
    "hundred words, and do not use bullet points.",
    "Suggest three other words for 'happy'.",
    "Write a polite email to my landlord, Ms Okafor, saying that the kitchen tap has been dripping since Tuesday and "
    "asking when a plumber can come.",
    "Which planet is closest to the Sun?",
    "Sort these words alphabetically and write one per line: pear, fig, banana, cherry, apple, mango, grape, plum.",
    "Write a SQL query that returns the ten customers with the highest total order value in 2023 from the tables "
    "customers(id, name) and orders(id, customer_id, total, ordered_at).",
    "Explain photosynthesis to a ten year old in four sentences.",
)
