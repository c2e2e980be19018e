//! A catalogue made up by rule: for demonstrations and tests without network.
//!
//! Invariant: the same rows on every machine and in every release, in the same order. Categories take turns, so that any
//! prefix is a whole shop; some products are nearly or quite sold out.

use super::Row;

struct Line {
    category: &'static str,
    code: &'static str,
    goods: &'static [&'static str],
    kinds: &'static [&'static str],
    sizes: &'static [(&'static str, i64)],
    base_cents: i64,
}

const BRANDS: [&str; 10] = [
    "Millrace",
    "Alder & Finch",
    "Old Ferry",
    "Northbank",
    "Heron Lane",
    "Willow Yard",
    "Two Bridges",
    "Stillwater",
    "Kingfisher",
    "Copper Kettle",
];

const LINES: [Line; 12] = [
    Line {
        category: "Tea",
        code: "TEA",
        goods: &["Green Tea", "Breakfast Tea", "Earl Grey", "Oolong Tea", "Peppermint Tea"],
        kinds: &["Loose Leaf", "Organic", "Decaf", "Reserve", "Everyday"],
        sizes: &[("100 g", 2), ("250 g", 4)],
        base_cents: 290,
    },
    Line {
        category: "Coffee",
        code: "COF",
        goods: &["House Coffee", "Espresso Beans", "Filter Coffee", "Ethiopian Coffee", "Decaf Coffee"],
        kinds: &["Whole Bean", "Ground", "Dark Roast", "Light Roast", "Organic"],
        sizes: &[("250 g", 2), ("1 kg", 7)],
        base_cents: 390,
    },
    Line {
        category: "Bakery",
        code: "BAK",
        goods: &["Sourdough Bread", "Rye Bread", "Butter Croissants", "Cinnamon Buns", "Seeded Rolls"],
        kinds: &["Classic", "Wholegrain", "Organic", "Stone-baked", "Small Batch"],
        sizes: &[("400 g", 2), ("800 g", 3)],
        base_cents: 190,
    },
    Line {
        category: "Cheese & Dairy",
        code: "DAI",
        goods: &["Cheddar Cheese", "Soft Goat Cheese", "Alpine Cheese", "Salted Butter", "Plain Yogurt"],
        kinds: &["Mild", "Mature", "Organic", "Farmhouse", "Light"],
        sizes: &[("200 g", 2), ("500 g", 4)],
        base_cents: 210,
    },
    Line {
        category: "Fruit & Vegetables",
        code: "FRU",
        goods: &["Apples", "Vine Tomatoes", "Carrots", "Baby Potatoes", "Salad Leaves"],
        kinds: &["Local", "Organic", "Heritage", "Washed", "Family Pack of"],
        sizes: &[("500 g", 2), ("1 kg", 3)],
        base_cents: 130,
    },
    Line {
        category: "Pantry",
        code: "PAN",
        goods: &["Spaghetti Pasta", "Basmati Rice", "Red Lentils", "Tomato Sauce", "Olive Oil"],
        kinds: &["Classic", "Organic", "Wholegrain", "Bronze-cut", "Chef's"],
        sizes: &[("500 g", 2), ("1 kg", 3)],
        base_cents: 160,
    },
    Line {
        category: "Chocolate & Sweets",
        code: "SWE",
        goods: &["Dark Chocolate", "Milk Chocolate", "Salted Caramels", "Hazelnut Truffles", "Fruit Gums"],
        kinds: &["Classic", "70 % ", "Sea Salt", "Gift Box of", "Organic"],
        sizes: &[("100 g", 2), ("300 g", 5)],
        base_cents: 240,
    },
    Line {
        category: "Drinks",
        code: "DRI",
        goods: &["Apple Juice", "Elderflower Drink", "Ginger Beer", "Sparkling Water", "Cold Brew Drink"],
        kinds: &["Cloudy", "Organic", "Classic", "No Sugar", "Spicy"],
        sizes: &[("330 ml", 1), ("1 l", 3)],
        base_cents: 150,
    },
    Line {
        category: "Kitchen",
        code: "KIT",
        goods: &["Frying Pan", "Chef's Knife", "Chopping Board", "Mixing Bowl", "Balloon Whisk"],
        kinds: &["Steel", "Oak", "Cast-iron", "Everyday", "Professional"],
        sizes: &[("small", 3), ("large", 5)],
        base_cents: 790,
    },
    Line {
        category: "Household",
        code: "HOU",
        goods: &["Laundry Detergent", "Dishwashing Liquid", "Glass Cleaner Spray", "Kitchen Towels", "Beeswax Candles"],
        kinds: &["Sensitive", "Lemon", "Unscented", "Concentrated", "Refill"],
        sizes: &[("500 ml", 2), ("1.5 l", 5)],
        base_cents: 220,
    },
    Line {
        category: "Bath & Body",
        code: "BAT",
        goods: &["Hand Soap", "Shampoo", "Body Lotion", "Bath Salts", "Toothpaste"],
        kinds: &["Lavender", "Citrus", "Unscented", "Oat", "Sea"],
        sizes: &[("100 ml", 2), ("300 ml", 4)],
        base_cents: 280,
    },
    Line {
        category: "Paper & Pens",
        code: "PAP",
        goods: &["Notebook", "Gel Pen Set", "Pencil Tin", "Greeting Cards", "Envelopes"],
        kinds: &["Lined", "Plain", "Recycled", "Pocket", "Studio"],
        sizes: &[("A6", 2), ("A5", 3)],
        base_cents: 350,
    },
];

/// How many products there are to generate.
pub const PRODUCTS: usize = LINES.len() * 25;

/// The n-th product.
fn product(index: usize) -> Row {
    let (line, turn) = (&LINES[index % LINES.len()], index / LINES.len());
    // Good and kind step together first, so that neighbours differ in both.
    let good = line.goods[turn % line.goods.len()];
    let kind = line.kinds[(turn + turn / line.goods.len()) % line.kinds.len()];
    let (size, factor) = line.sizes[(turn / 3) % line.sizes.len()];
    let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    let price_cents = line.base_cents * factor + (mixed % 19) as i64 * 10 + 9;
    let stock = match index {
        0 => 120,
        _ => match mixed % 23 {
            0 => 0,
            1..=3 => (mixed / 23 % 5) as i32 + 1,
            _ => 8 + (mixed / 23 % 85) as i32,
        },
    };
    Row {
        category: line.category.to_owned(),
        sku: format!("{}-{:03}", line.code, turn + 1),
        name: format!("{} {good} {size}", kind.trim()),
        brand: BRANDS[(mixed / 7 % BRANDS.len() as u64) as usize].to_owned(),
        price_cents,
        stock,
    }
}

/// The first `limit` products.
pub fn rows(limit: usize) -> impl Iterator<Item = Row> {
    (0..PRODUCTS.min(limit)).map(product)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn three_hundred_different_products_in_twelve_categories() {
        let all: Vec<Row> = rows(usize::MAX).collect();
        assert_eq!(all.len(), 300);
        assert_eq!(all.iter().map(|row| &row.category).collect::<HashSet<_>>().len(), 12);
        assert_eq!(all.iter().map(|row| &row.sku).collect::<HashSet<_>>().len(), 300);
        assert_eq!(all.iter().map(|row| (&row.category, &row.name)).collect::<HashSet<_>>().len(), 300);
        assert_eq!(all, rows(300).collect::<Vec<_>>());
        assert_eq!(all[..24], rows(24).collect::<Vec<_>>()[..]);
    }

    #[test]
    fn prices_and_stocks_are_plausible_and_some_run_out() {
        let all: Vec<Row> = rows(usize::MAX).collect();
        assert!(all.iter().all(|row| (100..10_000).contains(&row.price_cents) && (0..=120).contains(&row.stock)));
        assert!(all.iter().any(|row| row.stock == 0));
        assert!(all.iter().filter(|row| (2..=99).contains(&row.stock)).count() > 200);
    }
}
