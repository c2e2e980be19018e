//! Pictures for products that have none: a drawing chosen by words, colours by category, composition by product id.
//!
//! Invariant: the same product always looks the same; nothing of the product's text enters the markup.

use std::fmt::Write as _;

/// Background light, background deep, ink.
const COLOURS: [(&str, &str, &str); 12] = [
    ("#e8f1e4", "#bcd9b0", "#3f6b3a"),
    ("#fdeedd", "#f6cf9f", "#9a5a1c"),
    ("#e4eff6", "#b3d3e8", "#2b5f86"),
    ("#fbe7e4", "#f0b7ad", "#9b3d33"),
    ("#f1eafa", "#d3c0ee", "#5f4392"),
    ("#e2f3f0", "#a9dbd1", "#1f6d61"),
    ("#fdf5d8", "#f1dd8b", "#836612"),
    ("#f9e6f0", "#ecb5d2", "#8e3566"),
    ("#e9ecf5", "#bcc6e6", "#3b4c8c"),
    ("#f3ece4", "#dac3a8", "#6d4c2b"),
    ("#eaf3f7", "#b9dbe6", "#276377"),
    ("#eef2da", "#cfdc98", "#5b6a1c"),
];

/// `@` stands for the ink. Drawn in a square of 100 units.
const DRAWINGS: &[(&[&str], &str)] = &[
    (
        &["pantry", "canned", "shelf", "tin"],
        r##"<path fill="#fff" d="M30 32h40v46q-20 10-40 0z"/><ellipse cx="50" cy="32" rx="20" ry="7" fill="@"/><path fill="@" d="M30 46q20 8 40 0v20q-20 8-40 0z"/>"##,
    ),
    (
        &["cat ", "dog", "pet", "litter"],
        r#"<g fill="@"><ellipse cx="50" cy="62" rx="17" ry="14"/><circle cx="30" cy="46" r="7.5"/><circle cx="42" cy="33" r="8"/><circle cx="58" cy="33" r="8"/><circle cx="70" cy="46" r="7.5"/></g>"#,
    ),
    (
        &["baby", "infant", "diaper"],
        r##"<path fill="#fff" d="M38 44h24v34a6 6 0 0 1-6 6H44a6 6 0 0 1-6-6z"/><path fill="@" d="M36 38h28v8H36zM46 24q4-10 8 0l3 10H43zM38 60h10v3H38zm0 9h14v3H38z"/>"##,
    ),
    (
        &["ice cream", "sherbet", "novelt", "frozen", "ice"],
        r#"<g stroke="@" stroke-width="4.5" stroke-linecap="round"><path d="M50 20v60M24 35l52 30M24 65l52-30M43 26l7 7 7-7M43 74l7-7 7 7M29 46l1-9-9-1M71 46l-1-9 9-1M29 54l1 9-9 1M71 54l-1 9 9 1" fill="none"/></g>"#,
    ),
    (
        &["egg"],
        r##"<ellipse cx="40" cy="54" rx="16" ry="21" fill="#fff"/><ellipse cx="61" cy="60" rx="14" ry="18" fill="@" fill-opacity=".85"/>"##,
    ),
    (
        &["cheese", "brie", "cheddar", "gouda"],
        r##"<path fill="@" d="M18 66l52-34q12 6 12 20v14z" fill-opacity=".55"/><path fill="#fff" d="M18 60h64v18H18z"/><g fill="@"><circle cx="34" cy="69" r="4"/><circle cx="56" cy="71" r="5"/><circle cx="71" cy="66" r="3"/><circle cx="62" cy="50" r="4.5"/></g>"##,
    ),
    (
        &["yogurt", "cream", "butter", "margarine", "pudding"],
        r##"<path fill="#fff" d="M30 42h40l-5 38a4 4 0 0 1-4 3H39a4 4 0 0 1-4-3z"/><path fill="@" d="M27 34h46v9H27zM36 56h28l-1.500 12H37.500z"/>"##,
    ),
    (
        &["milk", "dairy"],
        r##"<path fill="#fff" d="M34 42l16-10 16 10v42H34z"/><path fill="@" d="M36 22h28v8l4 12H32l4-12zM34 58q8-6 16 0t16 0v12H34z"/>"##,
    ),
    (
        &["fish", "seafood", "salmon", "tuna", "shrimp", "sardine"],
        r##"<path fill="#fff" d="M18 50q22-28 48 0-26 28-48 0z"/><path fill="@" d="M62 50l20-15v30zM40 40q8 10 0 20z"/><circle cx="30" cy="47" r="3" fill="@"/>"##,
    ),
    (
        &["bacon", "beef", "pork", "steak", "meat", "ham", "turkey", "chicken", "sausage", "salami", "hot dog", "deli"],
        r##"<path fill="@" d="M24 58q-6-28 24-32 30-2 30 20 0 12-18 14t-14 12q-14 10-22-14z"/><path fill="#fff" fill-opacity=".85" d="M32 56q-2-20 18-22 18 0 19 12 0 6-14 8t-12 10q-8 4-11-8z"/><circle cx="46" cy="45" r="6" fill="@"/>"##,
    ),
    (
        &["wine", "beer", "ale", "spirit", "liquor", "cider"],
        r##"<path fill="#fff" d="M34 22h32q4 30-16 32-20-2-16-32z"/><path fill="@" d="M36 36h28q0 14-14 15-14-1-14-15zM48 54h4v22h-4zM36 76h28v5H36z"/>"##,
    ),
    (
        &["cereal", "oat", "granola", "muesli", "porridge", "soup", "noodle", "ramen", "rice"],
        r##"<path fill="@" d="M22 52h56q0 28-28 30-28-2-28-30z"/><g fill="#fff"><circle cx="36" cy="46" r="7"/><circle cx="50" cy="42" r="8"/><circle cx="64" cy="46" r="7"/></g><path fill="@" d="M64 40l14-18 4 3-13 18z"/>"##,
    ),
    (
        &["coffee", "espresso", "cocoa", "mug", "cup"],
        r##"<path fill="#fff" d="M26 42h40v26a14 14 0 0 1-14 14H40a14 14 0 0 1-14-14z"/><path d="M66 48h6a8 8 0 0 1 0 17h-6" fill="none" stroke="#fff" stroke-width="6"/><path d="M38 34q-5-6 0-12M50 34q-5-6 0-12" fill="none" stroke="@" stroke-width="4" stroke-linecap="round"/><path fill="@" d="M30 47h32v6H30z"/>"##,
    ),
    (
        &["tea", "herb", "spice", "salad", "lettuce", "spinach", "basil", "mint"],
        r##"<path fill="@" d="M24 74q-4-46 54-50 0 54-44 50l-6 8-4-3z"/><path d="M32 70q14-22 36-36" fill="none" stroke="#fff" stroke-width="3.500"/>"##,
    ),
    (
        &["chocolate", "candy", "gum", "sweet", "caramel", "toffee", "truffle"],
        r##"<rect x="28" y="24" width="44" height="54" rx="4" fill="@"/><g fill="#fff" fill-opacity=".82"><rect x="33" y="29" width="15" height="12" rx="2"/><rect x="52" y="29" width="15" height="12" rx="2"/><rect x="33" y="45" width="15" height="12" rx="2"/><rect x="52" y="45" width="15" height="12" rx="2"/></g>"##,
    ),
    (
        &["cookie", "snack", "cracker", "biscuit", "chip", "popcorn", "pretzel", "wafer", "cone"],
        r##"<circle cx="50" cy="52" r="28" fill="@" fill-opacity=".8"/><circle cx="50" cy="52" r="23" fill="#fff" fill-opacity=".35"/><g fill="#fff"><circle cx="41" cy="44" r="4.500"/><circle cx="57" cy="41" r="4"/><circle cx="62" cy="57" r="4.500"/><circle cx="46" cy="63" r="4"/><circle cx="50" cy="53" r="2.500"/></g>"##,
    ),
    (
        &[
            "bread",
            "roll",
            "bun",
            "loaf",
            "bakery",
            "bagel",
            "toast",
            "croissant",
            "pastry",
            "cake",
            "pie",
            "donut",
            "baked",
            "dough",
        ],
        r##"<path fill="@" d="M22 48q-2-20 28-20t28 20q0 6-6 8v22a4 4 0 0 1-4 4H32a4 4 0 0 1-4-4V56q-6-2-6-8z"/><path d="M40 42l-4 12M52 40l-4 14M64 42l-4 12" stroke="#fff" stroke-width="4" stroke-linecap="round"/>"##,
    ),
    (
        &[
            "tomato", "apple", "fruit", "pear", "peach", "berr", "grape", "citrus", "orange", "melon", "banana",
            "plum", "cherry",
        ],
        r##"<path fill="@" d="M50 40q-8-7-17-3-12 6-8 24 4 20 16 22 5 0 9-3 4 3 9 3 12-2 16-22 4-18-8-24-9-4-17 3z"/><path d="M50 38q0-10 8-16" fill="none" stroke="@" stroke-width="4" stroke-linecap="round"/><path d="M34 54q0-9 7-11" fill="none" stroke="#fff" stroke-width="4" stroke-linecap="round"/>"##,
    ),
    (
        &["carrot", "vegetable", "potato", "onion", "pepper", "cucumber", "squash", "corn", "produce", "beet", "leek"],
        r##"<path fill="@" d="M30 84q-8-2-6-8l22-36q8-6 14 0t0 14z"/><path d="M56 40q2-14 14-18M58 42q12-8 22-4M54 38q-4-10 2-20" fill="none" stroke="@" stroke-width="5" stroke-linecap="round"/><path d="M42 52l8 6M35 64l7 5" stroke="#fff" stroke-width="3.500" stroke-linecap="round"/>"##,
    ),
    (
        &[
            "tissue",
            "towel",
            "paper",
            "napkin",
            "notebook",
            "card",
            "magazine",
            "stationery",
            "pencil",
            "pen ",
            "envelope",
        ],
        r##"<rect x="28" y="22" width="44" height="58" rx="4" fill="#fff"/><path fill="@" d="M28 26a4 4 0 0 1 4-4h5v58h-5a4 4 0 0 1-4-4zM44 36h20v4H44zm0 10h20v4H44zm0 10h13v4H44z"/>"##,
    ),
    (
        &["pan", "pot", "knife", "board", "kitchen", "whisk", "bowl", "spoon", "dish rack"],
        r##"<circle cx="42" cy="54" r="24" fill="@"/><circle cx="42" cy="54" r="17" fill="#fff" fill-opacity=".75"/><path fill="@" d="M58 34l20-18 6 7-20 17z"/>"##,
    ),
    (
        &["soap", "shampoo", "lotion", "beauty", "bath", "hand", "skin", "cream", "oral", "tooth"],
        r##"<path fill="#fff" d="M32 46h36v32a6 6 0 0 1-6 6H38a6 6 0 0 1-6-6z"/><path fill="@" d="M46 34h8v12h-8zM38 26h20v8H38zM38 58h24v14H38z"/>"##,
    ),
    (
        &["detergent", "clean", "bleach", "laundry", "dishwash", "household", "spray", "air care"],
        r##"<path fill="#fff" d="M36 48q0-8 8-10h10q10 4 10 14v28a4 4 0 0 1-4 4H40a4 4 0 0 1-4-4z"/><path fill="@" d="M34 22h28l4 8-12 2v6H44v-6l-10 6zM36 58h28v14H36z"/>"##,
    ),
    (
        &["juice", "drink", "water", "soda", "lemonade", "beverage", "syrup", "oil", "vinegar", "cola", "kombucha"],
        r##"<path fill="#fff" d="M42 38q-8 6-8 16v26a4 4 0 0 0 4 4h24a4 4 0 0 0 4-4V54q0-10-8-16z"/><path fill="@" d="M43 18h14v7H43zm1 9h12v11H44zM34 56h32v16H34z"/>"##,
    ),
    (
        &[
            "sauce",
            "jam",
            "jelly",
            "honey",
            "peanut",
            "pickle",
            "olive",
            "condiment",
            "mustard",
            "spread",
            "dressing",
            "salt",
        ],
        r##"<path fill="#fff" d="M32 36h36q4 6 4 12v30a6 6 0 0 1-6 6H34a6 6 0 0 1-6-6V48q0-6 4-12z"/><path fill="@" d="M32 24h36v10H32zM34 50h32v20H34z"/><path d="M41 60h18" stroke="#fff" stroke-width="4" stroke-linecap="round"/>"##,
    ),
    (
        &["pasta", "flour", "sugar", "baking", "mix", "bean", "lentil", "grain", "nut", "dried"],
        r##"<path fill="#fff" d="M32 34h36l4 46a4 4 0 0 1-4 4H32a4 4 0 0 1-4-4z"/><path fill="@" d="M32 34l4-12h28l4 12zM50 76V50M50 50"/><g fill="@"><ellipse cx="50" cy="48" rx="4" ry="6.500"/><ellipse cx="41" cy="57" rx="4" ry="6.500" transform="rotate(-35 41 57)"/><ellipse cx="59" cy="57" rx="4" ry="6.500" transform="rotate(35 59 57)"/><ellipse cx="41" cy="69" rx="4" ry="6.500" transform="rotate(-35 41 69)"/><ellipse cx="59" cy="69" rx="4" ry="6.500" transform="rotate(35 59 69)"/></g>"##,
    ),
];

const BAG: &str = r##"<path fill="#fff" d="M28 40h44l4 40a4 4 0 0 1-4 4H28a4 4 0 0 1-4-4z"/><path d="M38 48V36a12 12 0 0 1 24 0v12" fill="none" stroke="@" stroke-width="4.500" stroke-linecap="round"/>"##;

fn mix(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The first drawing one of whose words is in the most telling text.
fn drawing(texts: &[&str]) -> &'static str {
    let found = texts.iter().find_map(|text| {
        let text = format!("{} ", text.to_lowercase());
        DRAWINGS.iter().find(|(words, _)| words.iter().any(|word| starts_a_word(&text, word))).map(|(_, shape)| *shape)
    });
    found.unwrap_or(BAG)
}

fn starts_a_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| at == 0 || !text.as_bytes()[at - 1].is_ascii_alphanumeric())
}

/// An inline SVG. `texts`: what to choose the drawing by, the most telling first; `group`: what shares its colours.
pub fn svg(seed: i64, texts: &[&str], group: &str) -> String {
    let (light, deep, ink) = COLOURS[(mix(group) % COLOURS.len() as u64) as usize];
    let noise = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let part = |shift: u32, range: u64| noise.rotate_right(shift) % range;
    let mut out = String::with_capacity(1200);
    let _ = write!(
        out,
        r#"<svg class="tile" viewBox="0 0 160 120" role="presentation" focusable="false"><rect width="160" height="120" fill="{light}"/><circle cx="{}" cy="{}" r="{}" fill="{deep}" fill-opacity=".55"/><circle cx="{}" cy="{}" r="{}" fill="{deep}" fill-opacity=".35"/><ellipse cx="80" cy="102" rx="34" ry="5" fill="{ink}" fill-opacity=".14"/><g transform="translate(80 58) rotate({}) scale(.{}) translate(-50 -50)">{}</g></svg>"#,
        20 + part(3, 120),
        10 + part(11, 50),
        36 + part(17, 30),
        part(23, 160),
        70 + part(29, 50),
        20 + part(37, 26),
        part(41, 13) as i64 - 6,
        84 + part(47, 10),
        drawing(texts).replace('@', ink),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_always_looks_the_same_and_its_text_stays_out() {
        let one = svg(7, &["<script>", "Cheese"], "<b>");
        assert_eq!(one, svg(7, &["<script>", "Cheese"], "<b>"));
        assert_ne!(one, svg(8, &["<script>", "Cheese"], "<b>"));
        assert!(!one.contains("script") && !one.contains("<b>") && !one.contains('@'));
    }

    #[test]
    fn words_choose_the_drawing() {
        assert_eq!(drawing(&["Green Tea 100g"]), drawing(&["x", "Herbs"]));
        assert_ne!(drawing(&["Steak"]), drawing(&["Tea"]));
        assert_eq!(drawing(&["Xyz"]), BAG);
    }
}
