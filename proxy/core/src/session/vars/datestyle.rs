//! DateStyle: the one setting whose value is two, an output style and the order of day and month, each kept when only the
//! other is set (check_datestyle in src/backend/commands/variable.c).
//!
//! Non-goal: whether the value is valid; a server has accepted it.

/// The value that holds once `value` has been set on top of `before`, both as SQL text behind `SET datestyle TO`.
pub(super) fn merge(before: Option<&str>, value: &str) -> String {
    let Some(mut new) = Parts::read(value) else { return value.to_owned() };
    // Which style German replaces does not matter: it brings its own order.
    if new.style == Some("german") && new.order.is_none() {
        new.order = Some("dmy");
    }
    let before = before.and_then(Parts::read).unwrap_or_default();
    let parts = [new.style.or(before.style), new.order.or(before.order)];
    parts.into_iter().flatten().map(|part| format!("'{part}'")).collect::<Vec<_>>().join(", ")
}

#[derive(Default)]
struct Parts {
    style: Option<&'static str>,
    order: Option<&'static str>,
}

impl Parts {
    /// `None` if there is a word in it whose meaning depends on more than this text, such as DEFAULT.
    fn read(value: &str) -> Option<Parts> {
        let mut parts = Parts::default();
        let words = value.split(|char: char| char == ',' || char == '\'' || char == '"' || char.is_ascii_whitespace());
        for word in words.filter(|word| !word.is_empty()).map(str::to_ascii_lowercase) {
            match word.as_str() {
                "iso" => parts.style = Some("iso"),
                "sql" => parts.style = Some("sql"),
                "german" => parts.style = Some("german"),
                word if word.starts_with("postgres") => parts.style = Some("postgres"),
                "ymd" => parts.order = Some("ymd"),
                "dmy" => parts.order = Some("dmy"),
                "mdy" | "us" => parts.order = Some("mdy"),
                word if word.starts_with("euro") => parts.order = Some("dmy"),
                word if word.starts_with("noneuro") => parts.order = Some("mdy"),
                _ => return None,
            }
        }
        Some(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn style_and_order_are_kept_apart() {
        let cases = [
            (None, "iso", "'iso'"),
            (Some("'Postgres, MDY'"), "iso", "'iso', 'mdy'"),
            (Some("'iso', 'mdy'"), "ymd", "'iso', 'ymd'"),
            (Some("'iso', 'ymd'"), "'German'", "'german', 'dmy'"),
            (Some("'german', 'dmy'"), "sql, us", "'sql', 'mdy'"),
            (Some("'sql', 'mdy'"), "european", "'sql', 'dmy'"),
            (Some("'sql', 'mdy'"), "'iso, default'", "'iso, default'"),
            (Some("'iso, default'"), "dmy", "'dmy'"),
        ];
        for (before, value, expected) in cases {
            assert_eq!(merge(before, value), expected, "{before:?} then {value}");
        }
    }
}
