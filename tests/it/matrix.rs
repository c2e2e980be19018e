//! The same bytes as Postgres sends, whoever asks, however the session came to its settings, and wherever the answer is from.
//!
//! Each axis (`axes.rs`) is one thing that shapes a result. All its sessions are open at once, through two proxies with one Redis
//! behind them, and ask the same statements in every format, in turn and in any order: a cache whose key lacked that thing would
//! give one session another's answer. What is right is what a session of its own, directly on the server, was sent: every frame
//! whole, but for the place in the server's source that an error names, and ParameterStatus, which may come at any time.
//!
//! Random sessions mix the axes. A longer run, with a seed of its own:
//!
//! ```text
//! WEIR_MATRIX_SESSIONS=2000 WEIR_MATRIX_SEED=7 cargo test -p weir-tests --test it -- --nocapture matrix
//! ```

mod axes;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use axes::Axis;
use bytes::BytesMut;
use weir_harness::{Proxy, Tier};
use weir_wire::backend::tag as server;
use weir_wire::frame;
use weir_wire::frontend::{Execute, Object, Parse, Target, put_query, put_sync, tag};

use crate::differential::Dice;
use crate::freshness::{cache_figure, until};
use crate::raw::Raw;

/// Random sessions unless more are asked for, and how many of them are open at once.
const SESSIONS: usize = 24;
const AT_ONCE: usize = 8;
/// Differences that are told.
const TOLD_MAX: usize = 8;

/// A parameter of a statement.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// 0: the server finds out.
    type_oid: u32,
    binary: bool,
    value: Option<&'static [u8]>,
}

/// A statement; `columns` is how many its result has.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    sql: &'static str,
    columns: usize,
    params: &'static [Param],
}

/// A session: who logs in with which startup parameters, and what it runs first.
#[derive(Clone, Debug)]
pub struct Seat {
    user: &'static str,
    startup: Vec<(String, String)>,
    before: Vec<String>,
}

impl Seat {
    fn of(user: &'static str) -> Self {
        Seat { user, startup: Vec::new(), before: Vec::new() }
    }
}

/// How a statement is sent, and how its values shall come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Simple,
    /// Extended protocol without a Describe.
    Bare,
    Text,
    Binary,
    /// Every other column in binary.
    Mixed,
}

const FORMS: [Form; 5] = [Form::Simple, Form::Bare, Form::Text, Form::Binary, Form::Mixed];

/// The frames of a reply, or why there was none.
type Answer = Vec<(char, Vec<u8>)>;

/// Where a session is opened.
struct Place<'a> {
    port: u16,
    shop_password: &'a str,
}

impl Place<'_> {
    fn dsn(&self, user: &str, database: &str) -> String {
        let password = if user == "shop" { self.shop_password } else { "pencil" };
        format!("postgres://{user}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    /// The session, if it was let in, and the replies to its login and to what it ran first.
    async fn sit(&self, seat: &Seat) -> Result<(Option<Raw>, Answer)> {
        let startup: Vec<(&str, &str)> = seat.startup.iter().map(|(name, value)| (&**name, &**value)).collect();
        let mut raw = match Raw::login(&self.dsn(seat.user, "shop"), &startup).await {
            Ok(raw) => raw,
            Err(refused) => return Ok((None, vec![('!', format!("{refused:#}").into_bytes())])),
        };
        let mut answers = Vec::new();
        for sql in &seat.before {
            put_query(&mut raw.out, sql);
            answers.extend(answer(&mut raw).await?);
        }
        Ok((Some(raw), answers))
    }
}

async fn answer(raw: &mut Raw) -> Result<Answer> {
    let (tags, bodies) = raw.until_ready().await?;
    let frames = tags.chars().zip(bodies).filter(|(kind, _)| *kind != char::from(server::PARAMETER_STATUS));
    Ok(frames
        .map(|(kind, body)| (kind, if matches!(kind, 'E' | 'N') { report(&body) } else { body.to_vec() }))
        .collect())
}

/// A report without the place in the server's source.
fn report(body: &[u8]) -> Vec<u8> {
    let fields = body.split(|byte| *byte == 0).filter(|field| !matches!(field.first(), Some(b'F' | b'L' | b'R')));
    fields.collect::<Vec<_>>().join(&0)
}

async fn put_and_answer(raw: &mut Raw, ask: &Ask, form: Form) -> Result<Answer> {
    put(ask, form, &mut raw.out);
    answer(raw).await.with_context(|| format!("{form:?} {ask:?}"))
}

fn put(ask: &Ask, form: Form, out: &mut BytesMut) {
    if form == Form::Simple {
        return put_query(out, ask.sql);
    }
    let types: Vec<u8> = ask.params.iter().flat_map(|param| param.type_oid.to_be_bytes()).collect();
    Parse { name: b"", sql: ask.sql.as_bytes(), types: &types }.put(out);
    let formats: Vec<u16> = match form {
        Form::Simple | Form::Bare => Vec::new(),
        Form::Text => vec![0],
        Form::Binary => vec![1],
        Form::Mixed => (0..ask.columns as u16).map(|column| (column + 1) % 2).collect(),
    };
    let put_count = |out: &mut BytesMut, count: usize| out.extend_from_slice(&(count as u16).to_be_bytes());
    frame::put(out, tag::BIND, |out| {
        out.extend_from_slice(b"\0\0");
        put_count(out, ask.params.len());
        ask.params.iter().for_each(|param| put_count(out, usize::from(param.binary)));
        put_count(out, ask.params.len());
        for param in ask.params {
            out.extend_from_slice(&param.value.map_or(-1, |value| value.len() as i32).to_be_bytes());
            out.extend_from_slice(param.value.unwrap_or_default());
        }
        put_count(out, formats.len());
        for format in formats {
            out.extend_from_slice(&format.to_be_bytes());
        }
    });
    if form != Form::Bare {
        Target { object: Object::Portal, name: b"" }.put(tag::DESCRIBE, out);
    }
    Execute { portal: b"", rows_max: 0 }.put(out);
    put_sync(out);
}

/// Two proxies in front of one server and one Redis, with everything in it.
struct Desk {
    tier: Tier,
    other: Proxy,
}

impl Desk {
    async fn open() -> Result<Desk> {
        let config = "[auth_query]\n[cache]\nmax_age = \"10m\"";
        let tier = Tier::builder().shards(1).redis(true).peers(true).config_extra(config).start().await?;
        let primary = &tier.shards[0].primary;
        primary.admin("shop").await?.batch_execute(axes::SCHEMA).await?;
        primary.admin("postgres").await?.batch_execute("CREATE DATABASE other OWNER shop").await?;
        for (database, what) in [("shop", "here"), ("other", "there")] {
            let table = format!(
                "CREATE TABLE places (what text); INSERT INTO places VALUES ('{what}'); GRANT SELECT ON places TO PUBLIC"
            );
            primary.admin(database).await?.batch_execute(&table).await?;
        }
        let config = tier.run.path().join("weir.toml");
        let other = format!("[[database.other.shard]]\nname = \"one\"\nprimary = \"{}\"\n", primary.address());
        std::fs::write(&config, std::fs::read_to_string(&config)? + "\n" + &other)?;
        // What was made beside it shall be known from the beginning.
        tier.restart_weir().await?;
        let other = tier.another().await?;
        let desk = Desk { tier, other };
        desk.share().await?;
        Ok(desk)
    }

    /// Until what one proxy stores is found by the other.
    async fn share(&self) -> Result<()> {
        let (here, there) = (self.tier.connect().await?, self.other.connect().await?);
        let mut round = 0;
        until(async || {
            round += 1;
            let sql = format!("SELECT t FROM shapes WHERE id = 1 AND id < {}", round + 10);
            let before = cache_figure(&self.other, "hits_redis").await?;
            for _ in 0..3 {
                here.simple_query(&sql).await?;
            }
            there.simple_query(&sql).await?;
            Ok(cache_figure(&self.other, "hits_redis").await? > before)
        })
        .await
    }

    fn direct(&self) -> Place<'_> {
        Place { port: self.tier.shards[0].primary.port(), shop_password: &self.tier.state.shop_password }
    }

    fn through(&self, proxy: &Proxy) -> Place<'_> {
        Place { port: proxy.port(), ..self.direct() }
    }

    /// The same statement in two databases of one server.
    async fn play_databases(&self) -> Result<()> {
        let place = self.through(self.tier.proxy());
        let mut here = Raw::login(&place.dsn("shop", "shop"), &[]).await?;
        let mut there = Raw::login(&place.dsn("shop", "other"), &[]).await?;
        let before = cache_figure(self.tier.proxy(), "hits_memory").await?;
        for _ in 0..10 {
            assert_eq!(here.query("SELECT what FROM places").await?.1, ["here"]);
            assert_eq!(there.query("SELECT what FROM places").await?.1, ["there"]);
        }
        ensure!(cache_figure(self.tier.proxy(), "hits_memory").await? > before, "nothing was answered from memory");
        Ok(())
    }

    /// Plays one axis; what went differently is added to `differences`. How many different answers Postgres itself gave to
    /// the statement that has most.
    async fn play(&self, axis: &Axis, dice: &mut Dice, differences: &mut String) -> Result<usize> {
        let questions: Vec<(&Ask, Form)> = axis
            .asks
            .iter()
            .flat_map(|ask| FORMS.map(|form| (ask, form)))
            .filter(|(ask, form)| *form != Form::Simple || ask.params.is_empty())
            .collect();
        let (mut wanted, mut open) = (Vec::new(), Vec::new());
        for (number, seat) in axis.seats.iter().enumerate() {
            let (raw, opened) = self.direct().sit(seat).await.with_context(|| format!("{}: {seat:?}", axis.name))?;
            let mut answers = Vec::new();
            if let Some(mut raw) = raw {
                for (ask, form) in &questions {
                    answers.push(put_and_answer(&mut raw, ask, *form).await?);
                }
            }
            for proxy in [self.tier.proxy(), &self.other] {
                let (raw, got) = self.through(proxy).sit(seat).await?;
                note(differences, (axis, seat), "its opening", (&opened, &got));
                open.extend(raw.map(|raw| (number, raw)));
            }
            wanted.push(answers);
        }
        for (place, (ask, form)) in questions.iter().enumerate() {
            // Three times each: the first may fill, the second be kept, the third be answered from memory.
            for _ in 0..3 {
                for last in (1..open.len()).rev() {
                    open.swap(last, dice.roll(last + 1));
                }
                for (number, raw) in &mut open {
                    let got = put_and_answer(raw, ask, *form).await?;
                    let Some(want) = wanted[*number].get(place) else { continue };
                    note(differences, (axis, &axis.seats[*number]), &format!("{form:?} {ask:?}"), (want, &got));
                }
            }
        }
        let different = |place: usize| wanted.iter().filter_map(|answers| answers.get(place)).collect::<BTreeSet<_>>();
        let per_ask = FORMS.len().min(questions.len());
        let several = (0..questions.len()).map(|place| different(place).len()).max().unwrap_or(0);
        // One session that asks many things shows its differences between statements.
        let between = wanted.first().map_or(0, |answers| answers.iter().collect::<BTreeSet<_>>().len() / per_ask);
        Ok(if wanted.len() == 1 { between } else { several })
    }
}

fn note(told: &mut String, (axis, seat): (&Axis, &Seat), what: &str, (want, got): (&Answer, &Answer)) {
    if want == got || told.matches("\n== ").count() >= TOLD_MAX {
        return;
    }
    let short = |answer: &Answer| {
        let text = answer.iter().map(|(kind, body)| format!("{kind} {}", body.escape_ascii())).collect::<Vec<_>>();
        text.join(" | ").chars().take(1500).collect::<String>()
    };
    let _ = write!(told, "\n== {}: {seat:?}\n{what}\n  pg {}\nweir {}", axis.name, short(want), short(got));
}

fn asked_for(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A session of which anything may be.
fn random_seat(dice: &mut Dice) -> Seat {
    let people = axes::people();
    let mut seat = people[dice.roll(people.len())].clone();
    for _ in 0..dice.roll(4) {
        let (name, values, _) = dice.pick(axes::SETTINGS);
        let value = dice.pick(values);
        let quoted = if name == "search_path" { value.to_owned() } else { format!("'{value}'") };
        match dice.roll(7) {
            0 if !seat.startup.iter().any(|(known, _)| known == name) => {
                seat.startup.push((name.to_owned(), value.to_owned()));
            }
            1 => seat.before.push(format!("SELECT set_config('{name}', '{value}', false)")),
            2 => seat.before.push(format!("RESET {name}")),
            3 => seat.before.extend(["BEGIN".into(), format!("SET {name} TO {quoted}"), "ROLLBACK".into()]),
            _ => seat.before.push(format!("SET {name} TO {quoted}")),
        }
    }
    seat
}

#[tokio::test(flavor = "multi_thread")]
async fn the_matrix_of_settings_formats_and_roles() -> Result<()> {
    let seed = asked_for("WEIR_MATRIX_SEED").unwrap_or(1);
    let sessions = asked_for("WEIR_MATRIX_SESSIONS").map_or(SESSIONS, |sessions| sessions as usize);
    let only = std::env::var("WEIR_MATRIX_AXIS").ok();
    let desk = Desk::open().await?;
    desk.play_databases().await?;
    let mut dice = Dice::new(seed);
    let mut differences = String::new();
    for axis in axes::all().iter().filter(|axis| only.as_deref().is_none_or(|only| only == axis.name)) {
        let began = Instant::now();
        let different = desk.play(axis, &mut dice, &mut differences).await?;
        println!("{}: {} sessions, {different} different answers, {:?}", axis.name, axis.seats.len(), began.elapsed());
        ensure!(different > 1 || !axis.differs, "nothing depends on {}, so nothing would show", axis.name);
    }
    let mut left = if only.is_some() { 0 } else { sessions };
    while left > 0 {
        let asks: Vec<&[Ask]> = axes::SETTINGS.iter().map(|(_, _, asks)| *asks).collect();
        let mut axis = Axis { name: "at random", seats: Vec::new(), asks: dice.pick(&asks), differs: false };
        axis.seats.extend((0..AT_ONCE.min(left)).map(|_| random_seat(&mut dice)));
        left -= axis.seats.len();
        desk.play(&axis, &mut dice, &mut differences).await?;
    }
    assert!(differences.is_empty(), "seed {seed}: weir answers differently from Postgres:{differences}");
    for proxy in [desk.tier.proxy(), &desk.other] {
        assert!(cache_figure(proxy, "hits_memory").await? > 100, "the cache has answered");
        assert!(!proxy.weir_log().contains("panicked"), "{}", proxy.weir_log());
    }
    if only.is_none() {
        assert!(cache_figure(&desk.other, "hits_redis").await? > 10, "and so has Redis");
    }
    Ok(())
}
