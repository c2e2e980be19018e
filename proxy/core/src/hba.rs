//! Who may come from where, and how they prove who they are: rules in the syntax of Postgres's pg_hba.conf.
//!
//! Invariant: the first rule that fits decides, and where none fits nobody gets in. What weir cannot honour as Postgres does is
//! an error of the file, never a rule that is skipped.
//! Non-goals: reading files, names of hosts, group membership, asking for proofs.
//! Source: parse_hba_line, check_hba, hba_getauthmethod in src/backend/libpq/hba.c; wording in src/backend/libpq/auth.c.

// The address types are plain values; only their path in std lies beside sockets.
use core::net::IpAddr;
use std::fmt;

use crate::error::{Blame, UserError, sqlstate};

mod parse;

/// An ordered list of rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hba {
    rules: Vec<Rule>,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// 1-based line of the file; 0 for the rule that holds without a file.
    pub line: usize,
    pub method: Method,
    pub certificate: ClientCertificate,
    channel: Channel,
    databases: Vec<Databases>,
    users: Vec<Users>,
    address: Address,
}

/// How a client proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Trust,
    Reject,
    Scram,
    /// MD5 where a password or MD5 hash is known, otherwise SCRAM.
    Md5,
    /// SCRAM, or MD5 for users of whom only an MD5 hash is known.
    AsStored,
    /// The certificate's common name is the user.
    Cert,
}

/// What is asked of a client's certificate beside the method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificate {
    NotAsked,
    /// Signed by a trusted authority.
    VerifyCa,
    /// And its common name is the user.
    VerifyFull,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Channel {
    Any,
    Encrypted,
    Plain,
    /// Unix sockets and GSSAPI, which weir has not.
    Never,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Databases {
    All,
    SameUser,
    /// Physical replication, and nothing else is.
    Replication,
    Named(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Users {
    All,
    Named(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Address {
    All,
    SameHost,
    /// The first so many bits count.
    Net(IpAddr, u32),
}

/// Who wants in.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    pub address: IpAddr,
    /// Where it reached us.
    pub local: IpAddr,
    pub encrypted: bool,
    pub user: &'a str,
    pub database: &'a str,
    /// Physical replication: no database.
    pub replication: bool,
}

/// What is wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HbaError {
    /// 1-based.
    pub line: usize,
    pub message: String,
    pub hint: Option<&'static str>,
}

impl Default for Hba {
    /// Passwords for everybody from everywhere.
    fn default() -> Self {
        let rule = Rule {
            line: 0,
            method: Method::AsStored,
            certificate: ClientCertificate::NotAsked,
            channel: Channel::Any,
            databases: vec![Databases::All, Databases::Replication],
            users: vec![Users::All],
            address: Address::All,
        };
        Hba { rules: vec![rule] }
    }
}

impl Hba {
    /// Reads a whole file.
    pub fn parse(text: &str) -> Result<Self, HbaError> {
        parse::rules(text).map(|rules| Hba { rules })
    }

    /// The first line that looks at client certificates.
    pub fn asks_for_certificates(&self) -> Option<usize> {
        let asks = |rule: &&Rule| rule.method == Method::Cert || rule.certificate != ClientCertificate::NotAsked;
        self.rules.iter().find(asks).map(|rule| rule.line)
    }

    /// The rule for this client. Errors: 28000 where it is rejected or no rule fits, in Postgres's words.
    pub fn decide(&self, peer: &Peer<'_>) -> Result<&Rule, UserError> {
        let rule = self.rules.iter().find(|rule| rule.fits(peer));
        let what = match rule {
            Some(rule) if rule.method != Method::Reject => return Ok(rule),
            Some(_) if peer.replication => "pg_hba.conf rejects replication connection for host",
            Some(_) => "pg_hba.conf rejects connection for host",
            None if peer.replication => "no pg_hba.conf entry for replication connection from host",
            None => "no pg_hba.conf entry for host",
        };
        let database = if peer.replication { String::new() } else { format!(", database \"{}\"", peer.database) };
        let encryption = if peer.encrypted { "SSL encryption" } else { "no encryption" };
        let message =
            format!("{what} \"{}\", user \"{}\"{database}, {encryption}", peer.address.to_canonical(), peer.user);
        let hint = match rule {
            Some(rule) => format!("Line {} of weir's hba_file says so.", rule.line),
            None => "The rules are in weir's hba_file; the first that fits decides.".to_owned(),
        };
        Err(UserError::new(Blame::Client, sqlstate::INVALID_AUTHORIZATION, message).hint(hint).fatal())
    }
}

impl Rule {
    fn fits(&self, peer: &Peer<'_>) -> bool {
        let channel = match self.channel {
            Channel::Any => true,
            Channel::Encrypted => peer.encrypted,
            Channel::Plain => !peer.encrypted,
            Channel::Never => false,
        };
        let database = |databases: &Databases| match databases {
            Databases::Replication => peer.replication,
            Databases::All => !peer.replication,
            Databases::SameUser => !peer.replication && peer.database == peer.user,
            Databases::Named(name) => !peer.replication && peer.database == name,
        };
        let user = |users: &Users| match users {
            Users::All => true,
            Users::Named(name) => peer.user == name,
        };
        channel && self.address.holds(peer) && self.databases.iter().any(database) && self.users.iter().any(user)
    }
}

impl Address {
    fn holds(self, peer: &Peer<'_>) -> bool {
        let address = peer.address.to_canonical();
        match self {
            Address::All => true,
            // Who connects from this machine to one of its addresses comes from that same address.
            Address::SameHost => address.is_loopback() || address == peer.local.to_canonical(),
            Address::Net(net, bits) => same_prefix(net, address, bits),
        }
    }
}

fn same_prefix(left: IpAddr, right: IpAddr, bits: u32) -> bool {
    match (left, right) {
        (IpAddr::V4(left), IpAddr::V4(right)) => {
            (left.to_bits() ^ right.to_bits()).checked_shr(32 - bits).unwrap_or(0) == 0
        }
        (IpAddr::V6(left), IpAddr::V6(right)) => {
            (left.to_bits() ^ right.to_bits()).checked_shr(128 - bits).unwrap_or(0) == 0
        }
        _ => false,
    }
}

impl fmt::Display for HbaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for HbaError {}

#[cfg(test)]
mod tests;
