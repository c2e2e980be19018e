//! What is known of statement texts: parsed once, found again by hash.
//!
//! Three maps per database, bounded by an estimate of what their entries weigh. *Shapes* are found by normalised text
//! (literals lifted), so that a simple query with ever new literals is parsed once. *Prepared* statements are found by exact
//! text, parameter types and how the text is read, and carry the names under which Backends keep them. Long *texts* that come again as they are
//! need not even be cut into tokens. What must not enter any: anything of one session, one user or one epoch.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{Equivalent, Weighter};
use weir_core::error::UserError;
use weir_core::id::ShardId;
use weir_core::plan::{self, Schema, Template, WithoutGuests};
use weir_core::session::effect::{Effects, effects_of, keeper_used};
use weir_core::session::pin::Pin;
use weir_core::session::vars::Reading;
use weir_core::sql::class::{Class, classify};
use weir_core::sql::lex::{Token, lex};
use weir_core::sql::normal::{Literal, LiteralKind, Normal, normalize};
use weir_core::topology::catalog::{DefaultKind, RelationKind};

use crate::database::View;
use crate::level::Hint;

/// What a database's maps may weigh.
const SHAPES_BYTES_MAX: u64 = 32 << 20;
const PREPARED_BYTES_MAX: u64 = 16 << 20;
const TEXTS_BYTES_MAX: u64 = 8 << 20;
const GUESTS_BYTES_MAX: u64 = 4 << 20;
/// An entry weighs this and a multiple of its text: the plan is about as long as what it is made of.
const ENTRY_BYTES: usize = 1024;
/// Shorter texts are cut into tokens as fast as they are found.
const TEXT_BYTES_MIN: usize = 64;
/// Texts whose first sight is remembered.
const SIGHTS: usize = 1024;
/// Where there is but one server to ask, longer statements are not parsed: it would cost more than it could tell.
const ALONE_TOKENS_MAX: usize = 60;
/// Templates kept for one shape whose literals shape the plan (ORDER BY 1 against ORDER BY 2).
const VARIANTS_MAX: usize = 64;

/// Everything that depends on the text alone.
pub struct Shape {
    pub class: Class,
    pub effects: Effects,
    /// It may give rows defaults that differ, such as numbers of a sequence.
    fills: bool,
    /// A replica's answer was too large to hold back; replicas are not asked again.
    large: AtomicBool,
    structural: Vec<u16>,
    first: Arc<Template>,
    variants: Mutex<HashMap<Box<[u8]>, Arc<Template>>>,
}

/// A statement of the extended protocol.
pub struct Prepared {
    pub id: u64,
    pub sql: Bytes,
    pub types: Bytes,
    pub view_version: u64,
    pub reading: Reading,
    pub shape: Arc<Shape>,
    pub template: Arc<Template>,
    /// What a comment around it asks for.
    pub hint: Hint,
    pub literals: Vec<Literal>,
    /// How shards are asked when their answers are merged, if that differs.
    pub merged: Option<Merged>,
    /// The types that each shard gives its parameters (big-endian OIDs), once they were asked for: those of the user's own
    /// types differ from shard to shard.
    pub parameter_types: Mutex<Vec<(ShardId, Bytes)>>,
    /// The statement with parameters for what its template's filling draws, once it was made.
    pub filled: OnceLock<Arc<Prepared>>,
    /// A parameter is declared as a type that its shard key could be misread by.
    pub mistyped: Option<Box<UserError>>,
}

/// A Parse message as a session means it.
#[derive(Clone, Copy)]
pub struct Said<'a> {
    pub sql: &'a Bytes,
    /// Big-endian type OIDs.
    pub types: &'a Bytes,
    pub reading: Reading,
}

pub struct Merged {
    pub id: u64,
    pub sql: Bytes,
}

/// A text with its template for this very set of literals.
pub struct Understood {
    pub shape: Arc<Shape>,
    pub template: Arc<Template>,
    /// What a comment around this very text asks for; another text of the shape may ask for something else.
    pub hint: Hint,
}

/// A long text, as it was understood.
struct Known {
    shape: Arc<Shape>,
    template: Arc<Template>,
    hint: Hint,
    literals: Box<[Literal]>,
}

/// Buffers a session reuses from statement to statement.
#[derive(Default)]
pub struct Scratch {
    pub tokens: Vec<Token>,
    pub normal: Normal,
    key: String,
}

impl Scratch {
    /// To be called between requests: only what a short statement needs is kept for a session that may stay idle.
    pub fn shrink(&mut self) {
        let text = self.normal.text.capacity() + self.key.capacity();
        if self.tokens.capacity() > 64 || self.normal.literals.capacity() > 16 || text > 1024 {
            *self = Scratch::default();
        }
    }

    /// What a shape is found by: the normalised text, and what tells texts apart that look alike once their literals are
    /// lifted: how many parameters are the client's own, and of which kind each literal is.
    fn key(&mut self) -> &str {
        self.key.clear();
        self.key.push_str(&self.normal.text);
        self.key.push('\0');
        self.key.extend(self.normal.literals.iter().map(|literal| match literal.kind {
            LiteralKind::Integer => 'i',
            LiteralKind::Decimal => 'd',
            LiteralKind::String => 's',
        }));
        if let Some(params) = char::from_u32(u32::from(self.normal.params) + 0x10000) {
            self.key.push(params);
        }
        &self.key
    }
}

type Map<K, V> = Cache<K, Arc<V>, ByText, foldhash::fast::RandomState>;

pub struct Statements {
    shapes: Map<ShapeKey, Shape>,
    prepared: Map<PreparedKey, Prepared>,
    texts: Map<ShapeKey, Known>,
    /// Filled while slots move.
    guests: Map<ShapeKey, WithoutGuests>,
    /// Hashes of long texts that were seen once.
    sights: Box<[AtomicU64]>,
    hasher: foldhash::fast::RandomState,
    next_id: AtomicU64,
    /// There is neither a second shard nor a replica nor a cache.
    alone: bool,
}

/// What an entry weighs, estimated by its text: the key has it, and so in other words has the plan.
#[derive(Clone)]
struct ByText;

impl Weighter<ShapeKey, Arc<Shape>> for ByText {
    fn weight(&self, key: &ShapeKey, _: &Arc<Shape>) -> u64 {
        (ENTRY_BYTES + 3 * key.text.len()) as u64
    }
}

impl Weighter<ShapeKey, Arc<Known>> for ByText {
    fn weight(&self, key: &ShapeKey, known: &Arc<Known>) -> u64 {
        (ENTRY_BYTES + key.text.len() + size_of_val(&*known.literals)) as u64
    }
}

impl Weighter<ShapeKey, Arc<WithoutGuests>> for ByText {
    fn weight(&self, key: &ShapeKey, _: &Arc<WithoutGuests>) -> u64 {
        (ENTRY_BYTES + key.text.len()) as u64
    }
}

impl Weighter<PreparedKey, Arc<Prepared>> for ByText {
    fn weight(&self, key: &PreparedKey, prepared: &Arc<Prepared>) -> u64 {
        let merged = prepared.merged.as_ref().map_or(0, |merged| merged.sql.len());
        (ENTRY_BYTES + key.sql.len() + key.types.len() + merged) as u64
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct ShapeKey {
    version: u64,
    text: Box<str>,
}

struct ShapeLookup<'a> {
    version: u64,
    text: &'a str,
}

impl Hash for ShapeLookup<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.version.hash(state);
        self.text.hash(state);
    }
}

impl Equivalent<ShapeKey> for ShapeLookup<'_> {
    fn equivalent(&self, key: &ShapeKey) -> bool {
        self.version == key.version && self.text == &*key.text
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct PreparedKey {
    version: u64,
    reading: Reading,
    sql: Bytes,
    types: Bytes,
}

impl Default for Statements {
    fn default() -> Self {
        Self::new()
    }
}

impl Statements {
    pub fn new() -> Self {
        fn map<K: Eq + Hash + Clone, V>(bytes_max: u64) -> Map<K, V>
        where
            ByText: Weighter<K, Arc<V>>,
        {
            let items = bytes_max as usize / (2 * ENTRY_BYTES);
            let (hasher, lifecycle) = (foldhash::fast::RandomState::default(), DefaultLifecycle::default());
            Cache::with(items, bytes_max, ByText, hasher, lifecycle)
        }
        Statements {
            shapes: map(SHAPES_BYTES_MAX),
            prepared: map(PREPARED_BYTES_MAX),
            texts: map(TEXTS_BYTES_MAX),
            guests: map(GUESTS_BYTES_MAX),
            sights: (0..SIGHTS).map(|_| AtomicU64::new(0)).collect(),
            hasher: foldhash::fast::RandomState::default(),
            next_id: AtomicU64::new(1),
            alone: false,
        }
    }

    /// For a database whose every statement goes to the one server there is.
    #[must_use]
    pub fn for_one_server(self) -> Self {
        Statements { alone: true, ..self }
    }

    /// A long text of one statement that has come before, as it is; leaves its literals in `scratch`. `None` says nothing.
    pub fn recall(&self, sql: &str, view: &View, scratch: &mut Scratch) -> Option<Understood> {
        if sql.len() < TEXT_BYTES_MIN {
            return None;
        }
        let known = self.texts.get(&ShapeLookup { version: view.version, text: sql })?;
        scratch.normal.literals.clear();
        scratch.normal.literals.extend_from_slice(&known.literals);
        let (shape, template) = (Arc::clone(&known.shape), Arc::clone(&known.template));
        Some(Understood { shape, template, hint: known.hint })
    }

    /// Makes a long text known to [`Statements::recall`] when it comes for the second time. `scratch` holds its literals.
    pub fn remember(&self, sql: &str, view: &View, understood: &Understood, scratch: &Scratch) {
        if sql.len() < TEXT_BYTES_MIN {
            return;
        }
        let hash = self.hasher.hash_one((view.version, sql));
        if self.sights[hash as usize % SIGHTS].swap(hash, Relaxed) == hash {
            let known = Known {
                shape: Arc::clone(&understood.shape),
                template: Arc::clone(&understood.template),
                hint: understood.hint,
                literals: scratch.normal.literals.as_slice().into(),
            };
            self.texts.insert(ShapeKey { version: view.version, text: sql.into() }, Arc::new(known));
        }
    }

    /// Shape and template of one statement; leaves its tokens and literals in `scratch`.
    pub fn understand(&self, sql: &str, view: &View, scratch: &mut Scratch) -> Understood {
        // What our lexer rejects Postgres rejects too; let it say so.
        relex(sql, scratch);
        self.understand_tokens(sql, view, scratch)
    }

    /// As [`Statements::understand`], for tokens that are there already.
    pub fn understand_tokens(&self, sql: &str, view: &View, scratch: &mut Scratch) -> Understood {
        normalize(sql, &scratch.tokens, &mut scratch.normal);
        let lookup = ShapeLookup { version: view.version, text: scratch.key() };
        let shape = match self.shapes.get(&lookup) {
            Some(shape) => shape,
            None => {
                let shape = Arc::new(self.learn(sql, view, scratch));
                let key = ShapeKey { version: view.version, text: scratch.key.as_str().into() };
                self.shapes.insert(key, Arc::clone(&shape));
                shape
            }
        };
        let template = shape.template(sql, view, scratch);
        Understood { shape, template, hint: Hint::around(sql, &scratch.tokens) }
    }

    /// Where a statement for several shards leaves guests out; leaves its tokens in `scratch`. The same for all texts of a shape.
    pub fn without_guests(
        &self,
        sql: &str,
        template: &Template,
        view: &View,
        scratch: &mut Scratch,
    ) -> Result<Arc<WithoutGuests>, UserError> {
        relex(sql, scratch);
        normalize(sql, &scratch.tokens, &mut scratch.normal);
        let lookup = ShapeLookup { version: view.version, text: scratch.key() };
        if let Some(known) = self.guests.get(&lookup) {
            return Ok(known);
        }
        let found = Arc::new(template.without_guests(&scratch.normal, &schema(view))?);
        let key = ShapeKey { version: view.version, text: scratch.key.as_str().into() };
        self.guests.insert(key, Arc::clone(&found));
        Ok(found)
    }

    fn learn(&self, sql: &str, view: &View, scratch: &Scratch) -> Shape {
        let class = classify(sql, &scratch.tokens);
        let mut effects = effects_of(&class, sql, &scratch.tokens);
        if keeper_used(sql, &scratch.tokens, &class, &view.catalog.keepers) {
            effects.pins.insert(Pin::Function);
        }
        let compiled = if self.alone && scratch.tokens.len() > ALONE_TOKENS_MAX && class.is_data() {
            plan::unread(&class)
        } else {
            plan::compile(&scratch.normal, &class, sql, &schema(view))
        };
        Shape {
            fills: fills(sql, &class, view, scratch),
            class,
            effects,
            large: AtomicBool::new(false),
            structural: compiled.structural,
            first: Arc::new(compiled.template),
            variants: Mutex::default(),
        }
    }

    /// The statement of a Parse message.
    pub fn prepare(&self, said: Said<'_>, view: &View, scratch: &mut Scratch) -> Arc<Prepared> {
        let Said { sql, types, reading } = said;
        let key = PreparedKey { version: view.version, reading, sql: sql.clone(), types: types.clone() };
        if let Some(known) = self.prepared.get(&key) {
            return known;
        }
        let text = std::str::from_utf8(sql).unwrap_or_default();
        let understood = self.understand(text, view, scratch);
        let merged = understood.template.rewrite().map(|rewrite| Merged {
            id: self.next_id.fetch_add(1, Relaxed),
            sql: Bytes::from(rewrite.apply(text, &scratch.tokens)),
        });
        let mistyped = understood.template.check_types(&type_oids(types)).err().map(Box::new);
        let prepared = Arc::new(Prepared {
            mistyped,
            id: self.next_id.fetch_add(1, Relaxed),
            // Own copies: the key must not keep a client's whole read buffer alive.
            sql: Bytes::copy_from_slice(sql),
            types: Bytes::copy_from_slice(types),
            view_version: view.version,
            reading,
            shape: understood.shape,
            template: understood.template,
            hint: understood.hint,
            literals: scratch.normal.literals.clone(),
            merged,
            parameter_types: Mutex::default(),
            filled: OnceLock::new(),
        });
        let (sql, types) = (prepared.sql.clone(), prepared.types.clone());
        let key = PreparedKey { version: view.version, reading, sql, types };
        self.prepared.insert(key, Arc::clone(&prepared));
        prepared
    }
}

fn schema(view: &View) -> Schema<'_> {
    Schema { rules: &view.rules, catalog: &view.catalog, search_path: &view.search_path, width: view.width }
}

/// Does it write rows of a table that has a default which differs, or triggers? So does what is not known.
fn fills(sql: &str, class: &Class, view: &View, scratch: &Scratch) -> bool {
    match class {
        Class::Insert | Class::Copy(_) | Class::Merge | Class::With { writes: true, .. } => {}
        Class::Update | Class::Select | Class::Values | Class::Table | Class::Delete | Class::With { .. } => {
            return false;
        }
        Class::Call | Class::Do | Class::Execute { .. } | Class::Other => return true,
        _ => return false,
    }
    let mut known = false;
    let mut differs = false;
    for &token in &scratch.tokens {
        let Some(name) = weir_core::sql::word::name(sql, token) else { continue };
        for relation in view.catalog.relations.values().filter_map(|relations| relations.get(&*name)) {
            known = true;
            differs |= relation.writes_spread
                || relation.kind != RelationKind::PlainTable
                || relation.columns.iter().any(|column| column.default == DefaultKind::Differs);
        }
    }
    differs || !known
}

impl Shape {
    /// May it draw from a sequence, by name or through the defaults and triggers of a table?
    pub fn draws(&self) -> bool {
        self.effects.draws || self.fills
    }

    /// Why the session must stay on the connection that has run this; the first reason stands for all.
    pub fn pin(&self) -> Option<Pin> {
        self.effects.pins.iter().next()
    }

    pub fn is_large(&self) -> bool {
        self.large.load(Relaxed)
    }

    pub fn mark_large(&self) {
        self.large.store(true, Relaxed);
    }

    fn template(&self, sql: &str, view: &View, scratch: &Scratch) -> Arc<Template> {
        if self.structural.is_empty() {
            return Arc::clone(&self.first);
        }
        let mut key = Vec::with_capacity(16);
        for index in &self.structural {
            if let Some(literal) = scratch.normal.literals.get(usize::from(*index)) {
                key.extend_from_slice(&sql.as_bytes()[literal.start as usize..literal.end as usize]);
                key.push(0);
            }
        }
        if let Some(known) = self.variants.lock().get(key.as_slice()) {
            return Arc::clone(known);
        }
        let template = Arc::new(plan::compile(&scratch.normal, &self.class, sql, &schema(view)).template);
        let mut variants = self.variants.lock();
        if variants.len() >= VARIANTS_MAX {
            variants.clear();
        }
        variants.insert(key.into(), Arc::clone(&template));
        template
    }
}

fn type_oids(types: &[u8]) -> Vec<u32> {
    types.chunks_exact(4).map(|oid| u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]])).collect()
}

/// Cuts the text into tokens again.
pub fn relex(sql: &str, scratch: &mut Scratch) {
    scratch.tokens.clear();
    if lex(sql, &mut scratch.tokens).is_err() {
        scratch.tokens.clear();
    }
}

impl Prepared {
    /// The parameter types the client declared; 0: left to the server.
    pub fn type_oids(&self) -> Vec<u32> {
        type_oids(&self.types)
    }

    /// The name under which Backends keep it.
    pub fn backend_name(id: u64) -> String {
        format!("weir_{id}")
    }
}
