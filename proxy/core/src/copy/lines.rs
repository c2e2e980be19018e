//! Line numbers: which line of the client's data is the n-th of a part.
//!
//! Invariant: a number is right or not given. What is remembered is bounded: the last lines of each part, far more than a
//! server can be behind with. Counted as Postgres counts (`cur_lineno` in src/backend/commands/copyfromparse.c).

use std::collections::VecDeque;

use super::text::Counted;

/// Lines remembered per part.
const REMEMBERED_MAX: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Lines {
    /// Lines of the client so far.
    pub total: u64,
    parts: Vec<Part>,
}

#[derive(Default, Debug)]
struct Part {
    count: u64,
    /// The lower halves of the client's line numbers of its last lines.
    last: VecDeque<u32>,
}

impl Lines {
    pub fn new(parts: usize) -> Self {
        Lines { total: 0, parts: (0..parts).map(|_| Part::default()).collect() }
    }

    /// The next row has that many lines and goes to `part`.
    pub fn add(&mut self, part: usize, counted: Counted) {
        let part = &mut self.parts[part];
        let start = self.total;
        self.total += u64::from(counted.lines);
        let own = if part.count == 0 { counted.as_first } else { counted.lines };
        for line in 1..u64::from(own) {
            part.push((start + line).min(self.total));
        }
        part.push(self.total);
    }

    /// The next line goes to every part.
    pub fn add_to_all(&mut self) {
        self.total += 1;
        for part in &mut self.parts {
            part.push(self.total);
        }
    }

    /// Has `part` been given any line?
    pub fn begun(&self, part: usize) -> bool {
        self.parts[part].count > 0
    }

    /// The client's number of line `own` of `part`.
    pub fn of(&self, part: usize, own: u64) -> Option<u64> {
        let part = self.parts.get(part)?;
        let Some(back) = part.count.checked_sub(own) else { return Some(self.total + 1) };
        let index = part.last.len().checked_sub(1 + usize::try_from(back).ok()?)?;
        Some(self.total - u64::from((self.total as u32).wrapping_sub(part.last[index])))
    }
}

impl Part {
    fn push(&mut self, line: u64) {
        if self.last.len() == REMEMBERED_MAX {
            self.last.pop_front();
        }
        self.last.push_back(line as u32);
        self.count += 1;
    }
}

/// The CONTEXT of a server's error with the line number that `renumber` makes of its own (`COPY t, line 3, column a: "x"`),
/// and that number. `None`: no line of it speaks of a line of `table`.
pub fn context_with_line(
    context: &str,
    table: &str,
    renumber: impl FnOnce(u64) -> Option<u64>,
) -> Option<(String, u64)> {
    let opening = format!("COPY {table}, ");
    let mut start = 0;
    for line in context.split('\n') {
        if let Some(rest) = line.strip_prefix(&*opening) {
            // The word for "line" is in the server's language.
            let word = rest.find(|letter: char| letter.is_ascii_digit())?;
            let digits = rest[word..].find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len() - word);
            let number = renumber(rest[word..word + digits].parse().ok()?)?;
            let at = start + opening.len() + word;
            return Some((format!("{}{number}{}", &context[..at], &context[at + digits..]), number));
        }
        start += line.len() + 1;
    }
    None
}
