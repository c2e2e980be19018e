//! Which values of a statement weir has to draw from sequences, because its servers would each count for themselves.
//!
//! Invariant: where a sequence of a sharded or reference table is drawn from or asked for, the statement is filled or refused; it
//! never reaches a server as it is. Non-goals: sequences inside functions and triggers.

use std::ops::Range;
use std::sync::Arc;

use super::super::fill::{Drawing, Filling, Patch, Sequence};
use super::super::refuse;
use super::{Compiler, Source};
use crate::error::UserError;
use crate::sql::class::Class;
use crate::sql::facts::TableName;
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::normal::Normal;
use crate::sql::rows::{Rows, default_values, split};
use crate::sql::word;
use crate::topology::Placement;
use crate::topology::catalog::{DrawnColumn, RelationName};

/// A call of nextval(), currval(), lastval() or setval().
struct Call {
    function: &'static str,
    /// All of it, with `pg_catalog.` if that is written.
    whole: Range<usize>,
    arguments: Vec<Range<usize>>,
}

/// What a call's first argument names.
enum Named {
    /// One of weir's.
    Own(Arc<Sequence>),
    /// One that the servers keep.
    Other,
    Unclear,
}

const FUNCTIONS: [&str; 4] = ["nextval", "currval", "lastval", "setval"];

impl Compiler<'_> {
    /// What has to be drawn for the statement; `None`: nothing.
    pub(super) fn filling(
        &mut self,
        class: &Class,
        source: Source<'_>,
        normal: &Normal,
    ) -> Result<Option<Filling>, UserError> {
        if self.single() || self.schema.catalog.drawn.is_empty() {
            return Ok(None);
        }
        match class {
            Class::Ddl(_) | Class::Truncate => return self.restarts(source).map_or(Ok(None), Err),
            _ if class.is_data() => {}
            Class::Explain { .. } | Class::Declare { .. } | Class::Copy(_) | Class::Prepare { .. } | Class::Merge => {}
            _ => return Ok(None),
        }
        let mut filling = Filling::default();
        if *class == Class::Insert {
            self.defaults(source, &mut filling)?;
        }
        if *class == Class::Select {
            self.read_as_table(source, &mut filling);
        }
        self.calls(class, source, normal, &mut filling)?;
        let draws = |name: Option<&RelationName>| {
            let next = |drawing: &Drawing| matches!(drawing, Drawing::Next(sequence) if name.is_none_or(|name| sequence.name == *name));
            filling.drawings.iter().any(next)
        };
        let mixed = filling.drawings.iter().find_map(|drawing| match drawing {
            Drawing::Current(sequence) => draws(Some(&sequence.name)).then_some(&*sequence.name.1),
            Drawing::Last => draws(None).then_some("its table"),
            _ => None,
        });
        if let Some(name) = mixed {
            return Err(refuse::sequence_mixed(name));
        }
        Ok(Some(filling.in_order()).filter(|filling| !filling.drawings.is_empty()))
    }

    /// DDL and TRUNCATE that would start a sequence of weir's anew.
    fn restarts(&self, source: Source<'_>) -> Option<UserError> {
        let restarts = |token: &Token| token.is_word(source.sql, "restart");
        source.original.iter().find(|token| restarts(token))?;
        let names = source.original.iter().filter_map(|token| word::name(source.sql, *token));
        let drawn = &self.schema.catalog.drawn;
        let of = |name: String| {
            drawn.iter().find_map(|(table, columns)| {
                let column = columns.iter().find(|column| *table.1 == *name || *column.sequence.1 == *name)?;
                self.sequence(&column.sequence)
            })
        };
        names.into_iter().find_map(of).map(|sequence| refuse::sequence_restart(&sequence.name.1))
    }

    /// `SELECT … FROM sequence`, as pg_dump asks for the number to go on with: the shards do not know it.
    fn read_as_table(&self, source: Source<'_>, filling: &mut Filling) {
        let tokens = source.original;
        let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
        let Some(from) = tokens[..end].iter().position(|token| token.is_word(source.sql, "from")) else { return };
        let name = from + 1..end;
        let is_name = match &tokens[name.clone()] {
            [_] => true,
            [_, dot, _] => dot.kind == TokenKind::Dot,
            _ => false,
        };
        let Some(table) = self.table(source, &name).filter(|_| is_name) else { return };
        let Some(sequence) = self.sequence(&(table.schema, table.name)) else { return };
        let (start, increment) = (sequence.rule.start, sequence.rule.increment);
        let columns = format!(
            "(SELECT CASE WHEN s.next > {start} THEN s.next - {increment} ELSE {start} END AS last_value, 0::bigint AS log_cnt, \
             s.next > {start} AS is_called FROM (SELECT "
        );
        let alias = format!(" AS next) AS s) AS {}", word::quote_name(&sequence.name.1));
        let value = Patch::Value(filling.drawings.len());
        filling.edits.push((name, vec![Patch::Text(columns.into()), value, Patch::Text(alias.into())]));
        filling.drawings.push(Drawing::Seen(sequence));
    }

    /// The sequence, if its numbers are weir's: a declared table is filled from it.
    fn sequence(&self, name: &RelationName) -> Option<Arc<Sequence>> {
        let rule = *self.schema.catalog.sequences.get(name)?;
        let mut columns = Vec::new();
        for (table, drawn) in &self.schema.catalog.drawn {
            let declared = *self.schema.rules.placement(&table.0, &table.1) != Placement::Global;
            let own = drawn.iter().filter(|column| declared && column.sequence == *name);
            columns.extend(own.map(|column| (table.clone(), column.column.clone())));
        }
        (!columns.is_empty()).then(|| Arc::new(Sequence { name: name.clone(), rule, columns }))
    }

    /// Columns of a declared table that are filled by weir.
    fn drawn(&self, table: &TableName) -> &[DrawnColumn] {
        if *self.schema.placement(table) == Placement::Global {
            return &[];
        }
        let name = (table.schema.clone(), table.name.clone());
        self.schema.catalog.drawn.get(&name).map_or(&[], Vec::as_slice)
    }

    fn table(&self, source: Source<'_>, range: &Range<usize>) -> Option<TableName> {
        let tokens = &source.original[range.clone()];
        let end = tokens.iter().position(|token| token.is_word(source.sql, "as")).unwrap_or(tokens.len());
        let names = tokens[..end].iter().filter_map(|token| word::name(source.sql, *token));
        let mut names: Vec<String> = names.collect();
        let name = names.pop()?;
        Some(self.schema.resolve(names.last().map(String::as_str), &name))
    }

    /// Defaults that an INSERT leaves to sequences.
    fn defaults(&self, source: Source<'_>, filling: &mut Filling) -> Result<(), UserError> {
        if let Some((table, words)) = default_values(source.sql, source.original) {
            if let Some(table) = self.table(source, &table) {
                self.default_row(&table, words, filling);
            }
            return Ok(());
        }
        let Some(rows) = Rows::find(source.sql, source.original) else { return Ok(()) };
        let Some(table) = self.table(source, &rows.table) else { return Ok(()) };
        let drawn = self.drawn(&table);
        if drawn.is_empty() {
            return Ok(());
        }
        let overriding = rows.overriding.as_ref().map(|range| source.original[range.start + 1]);
        if overriding.is_some_and(|word| word.is_word(source.sql, "user")) {
            return Err(refuse::sequence_user_value(&table));
        }
        let Some(listed) = self.listed(source, &rows, &table) else { return Ok(()) };
        let insert = Insert { source, rows: &rows, listed: &listed, drawn };
        if overriding.is_none() && insert.violates_always() {
            // Postgres says so itself.
            return Ok(());
        }
        let sequences: Option<Vec<_>> = drawn.iter().map(|column| self.sequence(&column.sequence)).collect();
        if let Some(sequences) = sequences {
            insert.fill(&sequences, overriding.is_some(), filling);
        }
        Ok(())
    }

    /// The names of the columns that the values are for; `None` if they are not known.
    fn listed(&self, source: Source<'_>, rows: &Rows, table: &TableName) -> Option<Vec<String>> {
        if let Some(columns) = &rows.columns {
            let parts = split(source.original, columns.clone());
            return parts.iter().map(|part| word::name(source.sql, *source.original.get(part.start)?)).collect();
        }
        let width = rows.values_of(0, source.original).len();
        let columns = &self.schema.relation(table)?.columns;
        (width <= columns.len()).then(|| columns[..width].iter().map(|column| column.name.to_string()).collect())
    }

    /// INSERT INTO table DEFAULT VALUES
    fn default_row(&self, table: &TableName, words: Range<usize>, filling: &mut Filling) {
        let drawn = self.drawn(table);
        let (mut names, mut values) = (String::from("("), Vec::new());
        for column in drawn {
            let Some(sequence) = self.sequence(&column.sequence) else { return };
            let comma = if values.is_empty() { "" } else { ", " };
            names.push_str(comma);
            names.push_str(&word::quote_name(&column.column));
            values.push(Patch::Text(comma.into()));
            values.push(Patch::Value(filling.drawings.len()));
            filling.drawings.push(Drawing::Next(sequence));
        }
        if drawn.is_empty() {
            return;
        }
        let always = drawn.iter().any(|column| column.always);
        let mut patches = vec![Patch::Text(
            format!("{names}) {}VALUES (", if always { "OVERRIDING SYSTEM VALUE " } else { "" }).into(),
        )];
        patches.extend(values);
        patches.push(Patch::Text(")".into()));
        filling.edits.push((words, patches));
    }

    /// Calls of sequence functions: answered where that is sure, refused elsewhere.
    fn calls(
        &mut self,
        class: &Class,
        source: Source<'_>,
        normal: &Normal,
        filling: &mut Filling,
    ) -> Result<(), UserError> {
        let tokens = source.original;
        let found = self.found_calls(source);
        if found.is_empty() {
            return Ok(());
        }
        // Which sequence is meant stands in a literal, and templates are shared by all values of literals.
        let inside = |start: u32| {
            found.iter().any(|call| tokens[call.whole.start].start <= start && start < tokens[call.whole.end - 1].end)
        };
        let literals = normal.literals.iter().enumerate().filter(|(_, literal)| inside(literal.start));
        self.structural.extend(literals.map(|(index, _)| index as u16));
        let answered = *class == Class::Insert || class.is_data();
        let rows = if *class == Class::Insert { Rows::find(source.sql, tokens) } else { None };
        let items = if *class == Class::Select { plain_items(source, &found) } else { Vec::new() };
        for call in found {
            let sequence = match self.named(source, &call) {
                Named::Other => continue,
                Named::Unclear => return Err(refuse::sequence_unclear(call.function)),
                Named::Own(sequence) => Some(sequence),
            };
            let sequence = sequence.filter(|_| call.function != "lastval");
            let name =
                sequence.as_ref().map_or_else(|| call.function.to_owned(), |sequence| sequence.name.1.to_string());
            let refused = || refuse::sequence_use(call.function, &name);
            let item = items.iter().find(|item| item.range.start == call.whole.start);
            let value = rows.as_ref().is_some_and(|rows| is_value(source, rows, &call.whole));
            let operand = call.whole.start > 0 && tokens[call.whole.start - 1].kind == TokenKind::Operator;
            let drawing = match (call.function, sequence) {
                ("nextval", Some(sequence)) if item.is_some() || value => Drawing::Next(sequence),
                ("currval", Some(sequence)) if item.is_some() || value || operand => Drawing::Current(sequence),
                ("lastval", _) if item.is_some() || value || operand => Drawing::Last,
                ("setval", Some(sequence)) if item.is_some() => set(source, &call, sequence).ok_or_else(refused)?,
                _ => return Err(refused()),
            };
            if !answered {
                return Err(refused());
            }
            let mut patches = vec![Patch::Value(filling.drawings.len())];
            filling.drawings.push(drawing);
            let mut range = call.whole.clone();
            if let Some(item) = item.filter(|item| !item.named) {
                // A cast behind the call stays, and the name is that of the call.
                patches.push(Patch::Text(slice(source, call.whole.end..item.range.end).into()));
                patches.push(Patch::Text(format!(" AS {}", call.function).into()));
                range.end = item.range.end;
            }
            filling.edits.push((range, patches));
        }
        Ok(())
    }

    fn found_calls(&self, source: Source<'_>) -> Vec<Call> {
        let tokens = source.original;
        let mut found = Vec::new();
        for (index, token) in tokens.iter().enumerate() {
            let Some(name) = word::name(source.sql, *token) else { continue };
            let Some(function) = FUNCTIONS.into_iter().find(|function| *function == name) else { continue };
            if tokens.get(index + 1).is_none_or(|next| next.kind != TokenKind::LeftParen) {
                continue;
            }
            let qualified = index >= 2 && tokens[index - 1].kind == TokenKind::Dot;
            let schema = if qualified { word::name(source.sql, tokens[index - 2]) } else { None };
            let own = match schema.as_deref() {
                None => !qualified && !self.schema.catalog.user_functions.contains_key(function),
                Some(schema) => schema == "pg_catalog",
            };
            let depth = tokens[index + 1].depth + 1;
            let closing = tokens[index + 1..]
                .iter()
                .position(|token| token.kind == TokenKind::RightParen && token.depth == depth);
            let Some(closing) = closing.filter(|_| own) else { continue };
            let end = index + 1 + closing;
            found.push(Call {
                function,
                whole: if qualified { index - 2..end + 1 } else { index..end + 1 },
                arguments: split(tokens, index + 2..end),
            });
        }
        found
    }

    fn named(&self, source: Source<'_>, call: &Call) -> Named {
        // Of lastval() only the session knows whose it is; any sequence stands for weir's.
        let argument = match (call.function, call.arguments.first()) {
            ("lastval", _) => {
                return self
                    .schema
                    .catalog
                    .sequences
                    .keys()
                    .find_map(|name| self.sequence(name))
                    .map_or(Named::Other, Named::Own);
            }
            (_, None) => return Named::Other,
            (_, Some(argument)) => argument.clone(),
        };
        let tokens = &source.original[argument];
        let name = match tokens {
            [text] => self.relation_named(source, *text),
            [text, cast, kind] if cast.kind == TokenKind::Cast && kind.is_word(source.sql, "regclass") => {
                self.relation_named(source, *text)
            }
            [function, _, table, comma, column, _]
                if function.is_word(source.sql, "pg_get_serial_sequence") && comma.kind == TokenKind::Comma =>
            {
                return self
                    .serial(source, *table, *column)
                    .map_or(Named::Unclear, |name| self.sequence(&name).map_or(Named::Other, Named::Own));
            }
            _ => None,
        };
        match name {
            None => Named::Unclear,
            Some(name) => self.sequence(&(name.schema, name.name)).map_or(Named::Other, Named::Own),
        }
    }

    /// A relation's name in a string, as regclass reads it.
    fn relation_named(&self, source: Source<'_>, token: Token) -> Option<TableName> {
        let text = word::string_value(source.sql, token)?;
        let mut tokens = Vec::new();
        lex(&text, &mut tokens).ok()?;
        let mut names: Vec<String> = tokens.iter().filter_map(|token| word::name(&text, *token)).collect();
        let name = names.pop()?;
        Some(self.schema.resolve(names.last().map(String::as_str), &name))
    }

    /// pg_get_serial_sequence(table, column)
    fn serial(&self, source: Source<'_>, table: Token, column: Token) -> Option<RelationName> {
        let table = self.relation_named(source, table)?;
        let column = word::string_value(source.sql, column)?;
        let columns = self.schema.catalog.drawn.get(&(table.schema, table.name))?;
        columns.iter().find(|drawn| *drawn.column == *column).map(|drawn| drawn.sequence.clone())
    }
}

/// An INSERT of rows into a table with drawn columns.
struct Insert<'a> {
    source: Source<'a>,
    rows: &'a Rows,
    listed: &'a [String],
    drawn: &'a [DrawnColumn],
}

impl Insert<'_> {
    fn position(&self, column: &DrawnColumn) -> Option<usize> {
        self.listed.iter().position(|listed| **listed == *column.column)
    }

    fn is_default(&self, value: &Range<usize>) -> bool {
        value.len() == 1 && self.source.original[value.start].is_word(self.source.sql, "default")
    }

    /// Does it give a value to a column that is GENERATED ALWAYS?
    fn violates_always(&self) -> bool {
        let given = |position: usize| {
            (0..self.rows.rows.len()).any(|row| {
                let values = self.rows.values_of(row, self.source.original);
                values.get(position).is_some_and(|value| !self.is_default(value))
            })
        };
        self.drawn.iter().filter(|column| column.always).filter_map(|column| self.position(column)).any(given)
    }

    fn fill(&self, sequences: &[Arc<Sequence>], overriding: bool, filling: &mut Filling) {
        let missing: Vec<usize> =
            (0..self.drawn.len()).filter(|index| self.position(&self.drawn[*index]).is_none()).collect();
        let names = |names: &mut dyn Iterator<Item = &str>| names.map(word::quote_name).collect::<Vec<_>>().join(", ");
        let added = names(&mut missing.iter().map(|index| &*self.drawn[*index].column));
        let before = filling.drawings.len();
        for row in 0..self.rows.rows.len() {
            self.fill_row(row, sequences, &missing, filling);
        }
        if filling.drawings.len() == before {
            return;
        }
        if !missing.is_empty() {
            let (at, text) = match &self.rows.columns {
                Some(columns) => (columns.end, format!(", {added}")),
                None => {
                    let listed = names(&mut self.listed.iter().map(String::as_str));
                    (self.rows.table.end, format!(" ({listed}, {added})"))
                }
            };
            filling.edits.push((at..at, vec![Patch::Text(text.into())]));
        }
        if !overriding && self.drawn.iter().any(|column| column.always) {
            let at = self.rows.values;
            filling.edits.push((at..at, vec![Patch::Text(" OVERRIDING SYSTEM VALUE".into())]));
        }
    }

    fn fill_row(&self, row: usize, sequences: &[Arc<Sequence>], missing: &[usize], filling: &mut Filling) {
        let values = self.rows.values_of(row, self.source.original);
        let mut tail = Vec::new();
        for (index, column) in self.drawn.iter().enumerate() {
            let number = filling.drawings.len();
            let given = self.position(column).and_then(|position| values.get(position));
            match given {
                Some(value) if self.is_default(value) => {
                    filling.edits.push((value.clone(), vec![Patch::Value(number)]));
                }
                None if missing.contains(&index) => {
                    tail.extend([Patch::Text(", ".into()), Patch::Value(number)]);
                }
                _ => continue,
            }
            filling.drawings.push(Drawing::Next(Arc::clone(&sequences[index])));
        }
        if !tail.is_empty() {
            let at = self.rows.rows[row].end - 1;
            filling.edits.push((at..at, tail));
        }
    }
}

/// Is the call a value of an INSERT's row, not inside a sub-query or another call?
fn is_value(source: Source<'_>, rows: &Rows, call: &Range<usize>) -> bool {
    let row = rows.rows.iter().find(|row| row.contains(&call.start));
    row.is_some_and(|row| source.original[call.start].depth == source.original[row.start].depth + 1)
}

/// An item of a SELECT list that starts with a call.
struct Item {
    range: Range<usize>,
    /// It has a name of its own.
    named: bool,
}

/// The items of `SELECT item, …` that are calls, if nothing in it could make more or less than one row.
fn plain_items(source: Source<'_>, calls: &[Call]) -> Vec<Item> {
    let (sql, tokens) = (source.sql, source.original);
    let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
    let clauses = [
        "from",
        "where",
        "union",
        "intersect",
        "except",
        "group",
        "having",
        "order",
        "limit",
        "offset",
        "into",
        "window",
        "fetch",
        "for",
        "distinct",
        "all",
        "select",
    ];
    let clause = |token: &Token| clauses.iter().any(|word| token.is_word(sql, word));
    if tokens.first().is_none_or(|first| !first.is_word(sql, "select")) || tokens[1..end].iter().any(clause) {
        return Vec::new();
    }
    let mut items = Vec::new();
    for mut range in split(tokens, 1..end) {
        let is_call = calls.iter().any(|call| call.whole.start == range.start);
        if !is_call && tokens[range.clone()].iter().any(|token| token.kind == TokenKind::LeftParen) {
            return Vec::new();
        }
        // Behind the call: casts by one name, then the item's own name.
        let close = tokens[range.clone()]
            .iter()
            .position(|token| token.kind == TokenKind::RightParen && token.depth == tokens[range.start].depth + 1);
        let Some(close) = close else { continue };
        let mut at = range.start + close + 1;
        while at + 1 < range.end && tokens[at].kind == TokenKind::Cast && tokens[at + 1].kind == TokenKind::Word {
            at += 2;
        }
        let named = at < range.end;
        let fits = match &tokens[at..range.end] {
            [] => true,
            [name] => matches!(name.kind, TokenKind::Word | TokenKind::QuotedWord),
            [word, name] => word.is_word(sql, "as") && matches!(name.kind, TokenKind::Word | TokenKind::QuotedWord),
            _ => false,
        };
        if fits && is_call {
            range.end = at;
            items.push(Item { range, named });
        }
    }
    items
}

/// setval(sequence, number [, drawn])
fn set(source: Source<'_>, call: &Call, sequence: Arc<Sequence>) -> Option<Drawing> {
    let word = |argument: &Range<usize>| match &source.original[argument.clone()] {
        [token] => Some(*token),
        _ => None,
    };
    let value = call.arguments.get(1).and_then(word)?;
    let text = word::string_value(source.sql, value).unwrap_or_else(|| value.text(source.sql).into());
    let value = text.parse().ok()?;
    let drawn = match call.arguments.get(2) {
        None => true,
        Some(argument) => {
            let word = word(argument)?;
            let known = word.is_word(source.sql, "true");
            if !known && !word.is_word(source.sql, "false") {
                return None;
            }
            known
        }
    };
    Some(Drawing::Set { sequence, value, drawn })
}

fn slice(source: Source<'_>, range: Range<usize>) -> &str {
    super::super::rewrite::slice(source.sql, source.original, &range)
}
