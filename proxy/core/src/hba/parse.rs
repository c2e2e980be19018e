//! Text of a pg_hba.conf → rules.
//!
//! Tokens as in next_token of src/backend/libpq/hba.c: blanks separate fields, commas the members of a field, quotes keep
//! both and take a keyword its meaning, `#` begins a comment, a backslash at the end joins the next line.

use core::net::IpAddr;

use super::{Address, Channel, ClientCertificate, Databases, HbaError, Method, Rule, Users};

type Parsed<T> = Result<T, Fault>;

/// An error without its line.
struct Fault {
    message: String,
    hint: Option<&'static str>,
}

#[derive(Debug)]
struct Token {
    text: String,
    quoted: bool,
}

type Field = Vec<Token>;

/// Fields of a line that are still to be read.
struct Fields(std::vec::IntoIter<Field>);

pub(super) fn rules(text: &str) -> Result<Vec<Rule>, HbaError> {
    let mut rules = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let mut line = line.to_owned();
        while line.ends_with('\\') {
            line.pop();
            let Some((_, more)) = lines.next() else { break };
            line.push_str(more);
        }
        let place = |fault: Fault| HbaError { line: number + 1, message: fault.message, hint: fault.hint };
        let fields = fields(&line).map_err(place)?;
        if !fields.is_empty() {
            rules.push(rule(number + 1, Fields(fields.into_iter())).map_err(place)?);
        }
    }
    Ok(rules)
}

// ---- tokens ----

fn fields(line: &str) -> Parsed<Vec<Field>> {
    let mut fields: Vec<Field> = Vec::new();
    let mut chars = line.chars().peekable();
    // After a comma the next token belongs to the same field, also behind blanks.
    let mut joined = false;
    loop {
        while chars.next_if(|char| char.is_whitespace()).is_some() {}
        match chars.peek() {
            None | Some('#') => break,
            Some(',') => {
                chars.next();
                continue;
            }
            Some(_) => {}
        }
        let token = token(&mut chars)?;
        match fields.last_mut() {
            Some(field) if joined => field.push(token),
            _ => fields.push(vec![token]),
        }
        joined = chars.next_if_eq(&',').is_some();
    }
    if joined {
        return Err(fault("the line ends behind a comma"));
    }
    Ok(fields)
}

/// Up to a blank, a comma or a comment that is not quoted.
fn token(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Parsed<Token> {
    let quoted = chars.peek() == Some(&'"');
    let mut text = String::new();
    let mut inside = false;
    while let Some(&char) = chars.peek() {
        if !inside && (char.is_whitespace() || char == ',' || char == '#') {
            break;
        }
        chars.next();
        if char != '"' {
            text.push(char);
        } else if inside && chars.next_if_eq(&'"').is_some() {
            text.push('"');
        } else {
            inside = !inside;
        }
    }
    if inside {
        return Err(fault("a quote is not closed"));
    }
    Ok(Token { text, quoted })
}

impl Token {
    fn is(&self, keyword: &str) -> bool {
        !self.quoted && self.text == keyword
    }

    /// What weir does not do behind its first character, unquoted.
    fn refuse(&self, what: &str) -> Parsed<()> {
        let hint = match self.text.chars().next() {
            _ if self.quoted => return Ok(()),
            Some('/') => "regular expressions are not supported: list the names",
            Some('@') => "included files are not supported: list the names",
            Some('+') => "weir does not know who is a member of a role: list the users",
            _ => return Ok(()),
        };
        Err(Fault { message: format!("{what} `{}` is not supported", self.text), hint: Some(hint) })
    }
}

impl Fields {
    fn list(&mut self, what: &str) -> Parsed<Field> {
        self.0.next().ok_or_else(|| fault(format!("the line ends before the {what}")))
    }

    fn one(&mut self, what: &str) -> Parsed<Token> {
        let mut field = self.list(what)?;
        match (field.pop(), field.is_empty()) {
            (Some(token), true) => Ok(token),
            _ => Err(fault(format!("more than one {what}"))),
        }
    }
}

fn fault(message: impl Into<String>) -> Fault {
    Fault { message: message.into(), hint: None }
}

// ---- rules ----

fn rule(line: usize, mut fields: Fields) -> Parsed<Rule> {
    let kind = fields.one("connection type")?;
    let channel = match kind.text.as_str() {
        "local" | "hostgssenc" => Channel::Never,
        "host" | "hostnogssenc" => Channel::Any,
        "hostssl" => Channel::Encrypted,
        "hostnossl" => Channel::Plain,
        text if text.starts_with("include") => {
            return Err(Fault {
                message: format!("`{text}` is not supported"),
                hint: Some("copy the lines of the included file"),
            });
        }
        text => return Err(fault(format!("unknown connection type `{text}`"))),
    };
    let databases = fields.list("databases")?.into_iter().map(databases).collect::<Parsed<_>>()?;
    let users = fields.list("users")?.into_iter().map(users).collect::<Parsed<_>>()?;
    let never = |address| Rule {
        line,
        method: Method::Reject,
        certificate: ClientCertificate::NotAsked,
        channel: Channel::Never,
        databases: Vec::new(),
        users: Vec::new(),
        address,
    };
    if kind.text == "local" {
        // No client of weir comes that way: whatever method the line names is not for us to judge.
        fields.one("method")?;
        return Ok(never(Address::All));
    }
    let address = address(&mut fields)?;
    let method = fields.one("method")?;
    if channel == Channel::Never {
        return Ok(never(address));
    }
    let mut rule = Rule {
        line,
        method: self::method(&method)?,
        certificate: ClientCertificate::NotAsked,
        channel,
        databases,
        users,
        address,
    };
    if rule.method == Method::Cert && channel != Channel::Encrypted {
        return Err(fault("method `cert` is for hostssl lines only"));
    }
    for option in fields.0.flatten() {
        apply(&mut rule, &option)?;
    }
    Ok(rule)
}

fn databases(token: Token) -> Parsed<Databases> {
    token.refuse("database")?;
    match token {
        token if token.is("all") => Ok(Databases::All),
        token if token.is("sameuser") => Ok(Databases::SameUser),
        token if token.is("replication") => Ok(Databases::Replication),
        token if token.is("samerole") || token.is("samegroup") => Err(Fault {
            message: format!("database `{}` is not supported", token.text),
            hint: Some("weir does not know who is a member of a role: list users and databases"),
        }),
        token => Ok(Databases::Named(token.text)),
    }
}

fn users(token: Token) -> Parsed<Users> {
    token.refuse("user")?;
    Ok(if token.is("all") { Users::All } else { Users::Named(token.text) })
}

fn address(fields: &mut Fields) -> Parsed<Address> {
    let token = fields.one("address")?;
    if token.is("all") {
        return Ok(Address::All);
    }
    if token.is("samehost") {
        return Ok(Address::SameHost);
    }
    if token.is("samenet") {
        return Err(Fault {
            message: "address `samenet` is not supported".to_owned(),
            hint: Some("write the network, as in 10.0.0.0/8"),
        });
    }
    let (text, bits) = match token.text.split_once('/') {
        Some((text, bits)) => (text, Some(bits)),
        None => (token.text.as_str(), None),
    };
    let net: IpAddr = text.parse().map_err(|_| Fault {
        message: format!("`{}` is not an address", token.text),
        hint: Some(
            "names of hosts are not supported: write 10.1.2.3/32, 10.0.0.0/8, 10.0.0.0 255.0.0.0, samehost or all",
        ),
    })?;
    let width = if net.is_ipv4() { 32 } else { 128 };
    let bits = match bits {
        Some(bits) => bits
            .parse()
            .ok()
            .filter(|bits| *bits <= width && !token.text.contains("/+"))
            .ok_or_else(|| fault(format!("`{}` is not a network", token.text)))?,
        None => mask(net, &fields.one("network mask")?)?,
    };
    Ok(Address::Net(net, bits))
}

/// The length of the prefix that a mask such as 255.255.0.0 keeps.
fn mask(net: IpAddr, token: &Token) -> Parsed<u32> {
    let bad = || Fault {
        message: format!("`{}` is not a network mask", token.text),
        hint: Some("write a mask of the address's own kind whose ones come first, or the network as in 10.0.0.0/8"),
    };
    match (net, token.text.parse().map_err(|_| bad())?) {
        (IpAddr::V4(_), IpAddr::V4(mask)) => {
            let ones = mask.to_bits().leading_ones();
            (mask.to_bits().count_ones() == ones).then_some(ones).ok_or_else(bad)
        }
        (IpAddr::V6(_), IpAddr::V6(mask)) => {
            let ones = mask.to_bits().leading_ones();
            (mask.to_bits().count_ones() == ones).then_some(ones).ok_or_else(bad)
        }
        _ => Err(bad()),
    }
}

fn method(token: &Token) -> Parsed<Method> {
    match token.text.as_str() {
        "trust" => Ok(Method::Trust),
        "reject" => Ok(Method::Reject),
        "scram-sha-256" => Ok(Method::Scram),
        "md5" => Ok(Method::Md5),
        "cert" => Ok(Method::Cert),
        "password" => Err(Fault {
            message: "method `password` is not supported".to_owned(),
            hint: Some("it sends passwords in clear; use scram-sha-256, or md5 for very old clients"),
        }),
        text => Err(Fault {
            message: format!("method `{text}` is not supported"),
            hint: Some("weir knows trust, reject, scram-sha-256, md5 and cert"),
        }),
    }
}

fn apply(rule: &mut Rule, option: &Token) -> Parsed<()> {
    let (name, value) =
        option.text.split_once('=').ok_or_else(|| fault(format!("option `{}` is not name=value", option.text)))?;
    let certificate = match (name, value) {
        ("clientcert", "verify-ca") => ClientCertificate::VerifyCa,
        ("clientcert", "verify-full") => ClientCertificate::VerifyFull,
        ("clientcert", _) => {
            return Err(Fault {
                message: format!("clientcert cannot be `{value}`"),
                hint: Some("it is verify-ca or verify-full"),
            });
        }
        _ => return Err(fault(format!("option `{name}` is not supported"))),
    };
    if rule.channel != Channel::Encrypted {
        return Err(fault("clientcert is for hostssl lines only"));
    }
    if rule.method == Method::Cert && certificate == ClientCertificate::VerifyCa {
        return Err(fault("method `cert` always verifies the user: clientcert=verify-ca contradicts it"));
    }
    rule.certificate = certificate;
    Ok(())
}
