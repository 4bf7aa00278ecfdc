"""Draws receipts with questions about them in LLaVA's format, and scores a model's answers (docs/receipts.md).

python examples/receipts.py draw runs/receipts
python examples/receipts.py score runs/receipts/test.json --model . --subfolder tiny
"""

import argparse
import json
import random
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

SIZE = (416, 640)  # 260 visual tokens
FONT_SIZE, LINE_HEIGHT = 30, 40
TAX_PERCENT = 7
OWNER_LETTERS = ("BDFGHKLMNPRST", "aeiou", "lmnrst", "aeiou", "klnrx")
TRADES = "Bakery Books Cafe Deli Farm Foods Grill Market Pantry Shop Store Toys"
GOODS = "Bagel Beans Brie Broth Cider Cocoa Dates Figs Gum Honey Kefir Kale Leek Mints Oats Pears Plums Rolls Stew Tofu"


def money(cents: int) -> str:
    return f"{cents / 100:.2f}"


class Receipt(NamedTuple):
    """What a receipt says; prices in cents."""

    shop: str
    day: date
    prices: dict[str, int]

    @property
    def subtotal(self) -> int:
        return sum(self.prices.values())

    @property
    def total(self) -> int:
        return self.subtotal + round(self.subtotal * TAX_PERCENT / 100)


def make_receipt(rng: random.Random) -> Receipt:
    """2 to 6 items at 0.50 to 19.99."""
    shop = f"{''.join(map(rng.choice, OWNER_LETTERS))} {rng.choice(TRADES.split())}"
    goods = rng.sample(GOODS.split(), k=rng.randint(2, 6))
    day = date(2020, 1, 1) + timedelta(days=rng.randrange(6 * 365))
    return Receipt(shop, day, {item: rng.randint(50, 1999) for item in goods})


def ask(receipt: Receipt) -> dict[str, str]:
    """dict[str, str] and their answers."""
    return {
        "What is the name of the shop?": receipt.shop,
        "What is the date?": receipt.day.isoformat(),
        "How many items were bought?": str(len(receipt.prices)),
        "What is the total?": money(receipt.total),
    }


def draw(receipt: Receipt, rng: random.Random) -> Image.Image:
    """The shop and the date in the middle, prices on the right, and cash and change below the total."""
    image = Image.new("RGB", SIZE, rng.choice(("white", "#f4efe2", "#eaf0f4")))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    cash = receipt.total + 500 - receipt.total % 500
    sums = {"Subtotal": receipt.subtotal, f"Tax {TAX_PERCENT}%": receipt.total - receipt.subtotal}
    sums |= {"Total": receipt.total, "Cash": cash, "Change": cash - receipt.total}
    left, top = rng.randint(20, 60), rng.randint(15, 30)
    right = SIZE[0] - left
    for line in (receipt.shop, receipt.day.isoformat()):
        pen.text((SIZE[0] / 2, top), line, "black", font, anchor="ma")
        top += LINE_HEIGHT
    for block in (receipt.prices, sums):
        pen.line((left, top + 8, right, top + 8), "black", 2)
        top += 20
        for name, cents in block.items():
            pen.text((left, top), name, "black", font)
            pen.text((right, top), money(cents), "black", font, anchor="ra")
            top += LINE_HEIGHT
    return image


def write_receipt(file: Path, rng: random.Random) -> dict[str, Any]:
    """Draws a receipt; returns its record in LLaVA's format, with the questions in any order."""
    receipt = make_receipt(rng)
    draw(receipt, rng).save(file)
    questions = list(ask(receipt).items())
    rng.shuffle(questions)
    turns = [turn for asked in questions for turn in zip(("human", "gpt"), asked, strict=True)]
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    conversations[0]["value"] = f"<image>\n{conversations[0]['value']}"
    return {"image": file.name, "conversations": conversations}


def write_receipts(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Writes NAME.json and NAME-0000.png, NAME-0001.png, ... for each name and number in `counts`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for name, count in counts.items():
        records = [write_receipt(folder / f"{name}-{number:04}.png", rng) for number in range(count)]
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1))


def score(model: PreTrainedModel, tokenizer: Any, file: Path) -> dict[str, list[bool]]:
    """Whether each answer is exactly right, by question. A receipt's questions are asked in one conversation."""
    results: dict[str, list[bool]] = {}
    for record in json.loads(file.read_text()):
        session, image = model.chat_session(tokenizer, dict(max_new_tokens=16)), file.parent / record["image"]
        texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, expected in zip(texts[::2], texts[1::2], strict=True):
            right = session.ask(question, image) == expected
            results.setdefault(question, []).append(right)
            image = None
    return results


def print_table(results: dict[str, list[bool]]) -> None:
    everything = [right for answers in results.values() for right in answers]
    print("| question | right |\n|---|---|")
    for question, answers in [*sorted(results.items()), ("all", everything)]:
        print(f"| {question} | {sum(answers)} of {len(answers)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="write train.json, test.json and their pictures")
    drawing.add_argument("folder", type=Path, metavar="DIR")
    for name, count in {"train": 300, "test": 100, "seed": 0}.items():
        drawing.add_argument(f"--{name}", type=int, default=count, metavar="N", help="default: %(default)s")
    scoring = commands.add_parser("score", help="print the number of right answers")
    scoring.add_argument("file", type=Path, metavar="FILE", help="test.json")
    scoring.add_argument("--model", required=True, metavar="DIR")
    scoring.add_argument("--subfolder", default="", metavar="NAME")
    options = parser.parse_args(arguments)
    if options.command == "draw":
        write_receipts(options.folder, {"train": options.train, "test": options.test}, options.seed)
        return
    source = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder, "trust_remote_code": True}
    model, tokenizer = AutoModel.from_pretrained(**source).eval(), AutoTokenizer.from_pretrained(**source)
    print_table(score(model, tokenizer, options.file))


if __name__ == "__main__":
    main()
