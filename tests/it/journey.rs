//! The journey of a customer through a running storefront, over HTTP, as a browser and as a program.
//!
//! Invariant: it knows only the storefront's address, so that the same suite judges the shop on whatever database it runs.
//! Every wait is for a state, with a bound. Runs may follow each other on one database: `suffix` and a random part keep
//! their customers apart. It needs a catalogue with at least one category of more than 24 products (the generated one will do).
//! Non-goals: load, and what happens behind the shop.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::header::{ACCEPT, ETAG, IF_NONE_MATCH, LOCATION, ORIGIN};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::{Value, json};

const GOOD_CARD: &str = "4242 4242 4242 4242";
const DECLINED_CARD: &str = "4000 0000 0000 0002";
const WAIT_MAX: Duration = Duration::from_secs(60);
const PASSWORD: &str = "a password for tests";

/// Walks through the whole shop; the first thing that is not as it should be ends the walk.
pub async fn run(base_url: &str, suffix: &str) -> Result<()> {
    let shop = Shop { base: base_url.trim_end_matches('/').to_owned(), run: format!("{suffix}-{}", unique()) };
    let began = shop.report().await.context("the report at the start")?;
    shop.health().await.context("health and assets")?;
    let product = shop.browse().await.context("browsing")?;
    shop.search(&product).await.context("search")?;
    let product = shop.product_page(product).await.context("product page")?;
    let buyer = shop.guest_becomes_customer(&product).await.context("guest cart and registration")?;
    shop.log_in_and_out(&buyer).await.context("log in and out")?;
    shop.quantities(&buyer).await.context("quantities")?;
    let paid = shop.buy(&buyer).await.context("checkout")?;
    shop.receipt(&buyer, &paid).await.context("receipt")?;
    shop.decline(&buyer).await.context("declined card")?;
    shop.double_submit(&buyer).await.context("double submit")?;
    shop.oversell().await.context("the last unit")?;
    shop.buy_in_a_browser().await.context("purchase through forms")?;
    shop.strangers(&buyer, &paid).await.context("what others may not do")?;
    shop.ended(&buyer).await.context("after logging out")?;
    shop.reported(&began).await.context("the report at the end")
}

struct Shop {
    base: String,
    run: String,
}

fn unique() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// A visitor with cookies of their own. Follows no redirects, so that they can be looked at.
struct Visitor {
    client: Client,
    base: String,
    email: String,
}

struct Answer {
    status: StatusCode,
    body: Value,
}

impl Answer {
    fn expect(self, status: StatusCode) -> Result<Value> {
        ensure!(self.status == status, "expected {status}, got {}: {}", self.status, self.body);
        Ok(self.body)
    }

    fn refused(self, status: StatusCode, code: &str) -> Result<()> {
        let body = self.expect(status)?;
        ensure!(body["error"]["code"] == code, "expected the error {code}, got {body}");
        ensure!(
            body["error"]["message"].as_str().is_some_and(|text| !text.is_empty()),
            "an error without words: {body}"
        );
        Ok(())
    }
}

async fn json_of(request: RequestBuilder) -> Result<Answer> {
    let answer = request.header(ACCEPT, "application/json").send().await?;
    let status = answer.status();
    let text = answer.text().await?;
    let body = serde_json::from_str(&text).with_context(|| format!("{status} with a body that is no JSON: {text}"))?;
    Ok(Answer { status, body })
}

impl Visitor {
    async fn get(&self, path: &str) -> Result<Answer> {
        json_of(self.client.get(self.at(path))).await.with_context(|| format!("GET {path}"))
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        json_of(self.client.post(self.at(path)).json(body)).await.with_context(|| format!("POST {path}"))
    }

    /// A page as a browser gets it.
    async fn page(&self, path: &str) -> Result<String> {
        let answer = self.client.get(self.at(path)).header(ACCEPT, "text/html,*/*;q=0.8").send().await?;
        ensure!(answer.status() == StatusCode::OK, "GET {path} as a page: {}", answer.status());
        Ok(answer.text().await?)
    }

    /// Sends a form as a browser does and returns where it leads.
    async fn form(&self, path: &str, fields: &[(&str, &str)]) -> Result<String> {
        let request = self.client.post(self.at(path)).header(ACCEPT, "text/html,*/*;q=0.8");
        leads_to(request.header(ORIGIN, &self.base).header("sec-fetch-site", "same-origin").form(fields)).await
    }

    fn at(&self, path: &str) -> String {
        if path.starts_with("http") { path.to_owned() } else { format!("{}{path}", self.base) }
    }

    async fn put_in_cart(&self, product: i64, qty: i64) -> Result<Value> {
        self.post("/cart", &json!({ "product_id": product, "qty": qty })).await?.expect(StatusCode::OK)
    }

    async fn check_out(&self, key: &str) -> Result<Answer> {
        let body =
            json!({ "ship_name": "Ann Buyer", "ship_address": "1 Weir Lane\nRivertown", "idempotency_key": key });
        self.post("/checkout", &body).await
    }

    async fn pay(&self, order: &Value, card: &str) -> Result<Answer> {
        let url = order["payment_url"].as_str().with_context(|| format!("no payment address in {order}"))?;
        self.post(url, &json!({ "card": card })).await
    }

    async fn order(&self, order: &Value) -> Result<Value> {
        let reference = order["order"].as_str().with_context(|| format!("no reference in {order}"))?;
        self.get(&format!("/orders/{reference}")).await?.expect(StatusCode::OK)
    }

    async fn history(&self) -> Result<Vec<Value>> {
        let body = self.get("/orders").await?.expect(StatusCode::OK)?;
        Ok(body["orders"].as_array().context("no list of orders")?.clone())
    }

    async fn available(&self, product: i64) -> Result<i64> {
        let body = self.get(&format!("/product/{product}")).await?.expect(StatusCode::OK)?;
        number(&body["available"])
    }
}

async fn leads_to(request: RequestBuilder) -> Result<String> {
    let answer = request.send().await?;
    let (status, target) = (answer.status(), answer.headers().get(LOCATION).cloned());
    let Some(target) = target.filter(|_| status == StatusCode::SEE_OTHER) else {
        bail!("expected a redirect, got {status}: {}", answer.text().await?);
    };
    Ok(target.to_str()?.to_owned())
}

fn number(value: &Value) -> Result<i64> {
    value.as_i64().with_context(|| format!("{value} is no whole number"))
}

fn list<'a>(body: &'a Value, name: &str) -> Result<&'a Vec<Value>> {
    body[name].as_array().with_context(|| format!("no list {name} in {body}"))
}

/// The value of a hidden field in a page.
fn field(page: &str, name: &str) -> Result<String> {
    let marker = format!("name=\"{name}\" value=\"");
    let (_, rest) = page.split_once(&marker).with_context(|| format!("no field {name} in the page"))?;
    Ok(rest.split('"').next().unwrap_or_default().to_owned())
}

impl Shop {
    fn visitor(&self, name: &str) -> Result<Visitor> {
        let client = Client::builder()
            .cookie_store(true)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(WAIT_MAX)
            .build()?;
        Ok(Visitor { client, base: self.base.clone(), email: format!("{name}-{}@example.org", self.run) })
    }

    async fn customer(&self, name: &str) -> Result<Visitor> {
        let visitor = self.visitor(name)?;
        let body = json!({ "name": name, "email": visitor.email, "password": PASSWORD });
        visitor.post("/register", &body).await?.expect(StatusCode::CREATED)?;
        Ok(visitor)
    }

    async fn report(&self) -> Result<(i64, i64)> {
        let report = self.visitor("owner")?.get("/admin/report").await?.expect(StatusCode::OK)?;
        list(&report, "days")?.iter().try_fold((0, 0), |sums: (i64, i64), day| {
            ensure!(number(&day["customers"])? >= 1, "a day without customers: {day}");
            Ok((sums.0 + number(&day["orders"])?, sums.1 + number(&day["revenue_cents"])?))
        })
    }

    async fn health(&self) -> Result<()> {
        let visitor = self.visitor("passer-by")?;
        let health = visitor.get("/healthz").await?.expect(StatusCode::OK)?;
        ensure!(health["database"] == "ok", "{health}");
        let page = visitor.page("/").await?;
        let style = page.split("<link rel=\"stylesheet\" href=\"").nth(1).and_then(|rest| rest.split('"').next());
        let style = visitor.at(style.context("the front page names no style sheet")?);
        let first = visitor.client.get(&style).send().await?.error_for_status()?;
        let etag = first.headers().get(ETAG).context("an asset without ETag")?.clone();
        let again = visitor.client.get(&style).header(IF_NONE_MATCH, etag).send().await?;
        ensure!(again.status() == StatusCode::NOT_MODIFIED, "an unchanged asset was sent again: {}", again.status());
        visitor.get("/no/such/page").await?.refused(StatusCode::NOT_FOUND, "not_found")
    }

    /// Pages through a category to its end; returns one of its products.
    async fn browse(&self) -> Result<Value> {
        let visitor = self.visitor("passer-by")?;
        let home = visitor.get("/").await?.expect(StatusCode::OK)?;
        for category in list(&home, "categories")? {
            let slug = category["slug"].as_str().context("a category without slug")?;
            let first = visitor.get(&format!("/category/{slug}")).await?.expect(StatusCode::OK)?;
            if first["next_after"].is_null() {
                continue;
            }
            let page = visitor.page(&format!("/category/{slug}")).await?;
            ensure!(page.contains("rel=\"next\""), "the first page of {slug} does not lead on");
            let mut seen = Vec::new();
            let mut current = first.clone();
            for _ in 0..500 {
                let products = list(&current, "products")?;
                ensure!(products.len() <= 24, "a page of {} products", products.len());
                for product in products {
                    let id = number(&product["id"])?;
                    ensure!(seen.last().is_none_or(|last| *last < id), "{slug}: {id} after {:?}", seen.last());
                    seen.push(id);
                }
                let Some(after) = current["next_after"].as_i64() else { break };
                ensure!(seen.last() == Some(&after), "the next page of {slug} begins after {after}");
                current = visitor.get(&format!("/category/{slug}?after={after}")).await?.expect(StatusCode::OK)?;
            }
            ensure!(seen.len() > 24, "{slug} ended after {} products", seen.len());
            visitor.get("/category/no-such-category").await?.refused(StatusCode::NOT_FOUND, "not_found")?;
            return list(&first, "products")?.first().cloned().context("an empty first page");
        }
        bail!("no category has more than one page: load a catalogue first")
    }

    async fn search(&self, product: &Value) -> Result<()> {
        let visitor = self.visitor("passer-by")?;
        let name = product["name"].as_str().context("a product without name")?;
        let words: Vec<&str> = name.split(|c: char| !c.is_alphanumeric()).filter(|word| word.len() > 2).collect();
        let query = words.join("+");
        let found = visitor.get(&format!("/search?q={query}")).await?.expect(StatusCode::OK)?;
        let same = |other: &Value| other["name"] == product["name"];
        ensure!(list(&found, "products")?.iter().any(same), "{query} does not find {product}: {found}");
        let page = visitor.page(&format!("/search?q={query}")).await?;
        ensure!(page.contains("best match first"), "the page of a search for {query}");
        let none = visitor.get("/search?q=zzyzxq").await?.expect(StatusCode::OK)?;
        ensure!(list(&none, "products")?.is_empty(), "nonsense was found: {none}");
        Ok(())
    }

    /// A product with at least three units, with its stock.
    async fn product_page(&self, first: Value) -> Result<Value> {
        let visitor = self.visitor("passer-by")?;
        let found = self.stocked(&visitor, 3, 99, &[]).await?;
        let id = number(&found["product"]["id"])?;
        let page = visitor.page(&format!("/product/{id}")).await?;
        let price = number(&found["product"]["price_cents"])?;
        ensure!(page.contains(&format!(".{:02}", price % 100)), "the page of {id} does not show its price");
        ensure!(page.contains("action=\"/cart\""), "the page of {id} has no way into the cart");
        let shown = visitor.get(&format!("/product/{}", first["id"])).await?.expect(StatusCode::OK)?;
        ensure!(shown["product"]["name"] == first["name"], "the list says {first}, the page {shown}");
        for missing in ["/product/999999999999", "/product/x", "/product/99999999999999999999"] {
            visitor.get(missing).await?.refused(StatusCode::NOT_FOUND, "not_found")?;
        }
        Ok(found)
    }

    /// A product whose stock is within bounds and whose id is not excluded, sought from a place of this run's own.
    async fn stocked(&self, visitor: &Visitor, least: i64, most: i64, except: &[i64]) -> Result<Value> {
        let home = visitor.get("/").await?.expect(StatusCode::OK)?;
        let categories = list(&home, "categories")?;
        let start = self.run.bytes().fold(7_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        for index in 0..categories.len() {
            let slug = categories[(start + index) % categories.len()]["slug"].as_str().context("no slug")?;
            let page = visitor.get(&format!("/category/{slug}")).await?.expect(StatusCode::OK)?;
            let products = list(&page, "products")?;
            for index in 0..products.len() {
                let id = number(&products[(start + index) % products.len()]["id"])?;
                if except.contains(&id) {
                    continue;
                }
                let found = visitor.get(&format!("/product/{id}")).await?.expect(StatusCode::OK)?;
                if (least..=most).contains(&number(&found["available"])?) {
                    return Ok(found);
                }
            }
        }
        bail!("no product has between {least} and {most} units left")
    }

    async fn guest_becomes_customer(&self, product: &Value) -> Result<Visitor> {
        let id = number(&product["product"]["id"])?;
        let guest = self.visitor("ann")?;
        let empty = guest.get("/cart").await?.expect(StatusCode::OK)?;
        ensure!(list(&empty, "lines")?.is_empty(), "a new visitor has a cart: {empty}");
        let before = guest.put_in_cart(id, 2).await?;
        ensure!(number(&before["total_cents"])? == 2 * number(&product["product"]["price_cents"])?, "{before}");
        guest.get("/orders").await?.refused(StatusCode::UNAUTHORIZED, "log_in")?;
        guest.check_out("a guest cannot").await?.refused(StatusCode::UNAUTHORIZED, "log_in")?;

        let entered = json!({ "name": "Ann", "email": guest.email.to_uppercase(), "password": PASSWORD });
        let short = json!({ "name": "Ann", "email": guest.email, "password": "short" });
        guest.post("/register", &short).await?.refused(StatusCode::UNPROCESSABLE_ENTITY, "invalid")?;
        guest.post("/register", &entered).await?.expect(StatusCode::CREATED)?;
        let after = guest.get("/cart").await?.expect(StatusCode::OK)?;
        ensure!(after["lines"] == before["lines"], "registering changed the cart from {before} to {after}");
        let account = guest.get("/account").await?.expect(StatusCode::OK)?;
        ensure!(account["email"] == guest.email.as_str() && account["name"] == "Ann", "{account}");

        let other = self.visitor("bob")?;
        other.post("/register", &entered).await?.refused(StatusCode::CONFLICT, "email_taken")?;
        other.get("/account").await?.refused(StatusCode::UNAUTHORIZED, "log_in")?;
        Ok(guest)
    }

    async fn log_in_and_out(&self, ann: &Visitor) -> Result<()> {
        let other = self.visitor("ann")?;
        let wrong = json!({ "email": ann.email, "password": "not the password" });
        other.post("/login", &wrong).await?.refused(StatusCode::UNAUTHORIZED, "wrong_login")?;
        let unknown = json!({ "email": format!("nobody-{}@example.org", self.run), "password": PASSWORD });
        other.post("/login", &unknown).await?.refused(StatusCode::UNAUTHORIZED, "wrong_login")?;
        other.post("/login", &json!({ "email": ann.email, "password": PASSWORD })).await?.expect(StatusCode::OK)?;
        // Written through one connection of the shop, read at once through any other.
        other.post("/account", &json!({ "name": "Ann Brook" })).await?.expect(StatusCode::OK)?;
        for visitor in [&other, ann] {
            let account = visitor.get("/account").await?.expect(StatusCode::OK)?;
            ensure!(account["name"] == "Ann Brook", "a rename is not seen: {account}");
        }
        other.post("/logout", &json!({})).await?.expect(StatusCode::OK)?;
        other.get("/account").await?.refused(StatusCode::UNAUTHORIZED, "log_in")?;
        ann.get("/account").await?.expect(StatusCode::OK).map(drop)
    }

    async fn quantities(&self, ann: &Visitor) -> Result<()> {
        let cart = ann.get("/cart").await?.expect(StatusCode::OK)?;
        let first = number(&list(&cart, "lines")?.first().context("an empty cart")?["product_id"])?;
        let second = number(&self.stocked(ann, 2, 99, &[first]).await?["product"]["id"])?;
        ann.put_in_cart(second, 1).await?;
        let cart = ann.put_in_cart(second, 1).await?;
        let line = list(&cart, "lines")?.iter().find(|line| line["product_id"] == second).context("no second line")?;
        ensure!(line["qty"] == 2, "one and one make {line}");
        let update = |product: i64, qty: i64| json!({ "product_id": product, "qty": qty });
        let cart = ann.post("/cart/update", &update(first, 1)).await?.expect(StatusCode::OK)?;
        let sum = list(&cart, "lines")?
            .iter()
            .map(|line| Ok(number(&line["qty"])? * number(&line["price_cents"])?))
            .sum::<Result<i64>>()?;
        ensure!(sum == number(&cart["total_cents"])?, "the lines sum up to {sum}: {cart}");
        for bad in [-1, 100, 1_000_000] {
            ann.post("/cart/update", &update(first, bad))
                .await?
                .refused(StatusCode::UNPROCESSABLE_ENTITY, "invalid")?;
        }
        ann.post("/cart", &update(first, 0)).await?.refused(StatusCode::UNPROCESSABLE_ENTITY, "invalid")?;
        let cart = ann.post("/cart/update", &update(second, 0)).await?.expect(StatusCode::OK)?;
        ensure!(list(&cart, "lines")?.len() == 1, "the second line is still there: {cart}");
        ann.post("/cart/update", &update(second, 1)).await?.refused(StatusCode::NOT_FOUND, "not_found")
    }

    async fn buy(&self, ann: &Visitor) -> Result<Value> {
        let cart = ann.get("/cart").await?.expect(StatusCode::OK)?;
        let line = list(&cart, "lines")?.first().context("an empty cart")?.clone();
        let product = number(&line["product_id"])?;
        let agreed = json!({
            "ship_name": "Ann", "ship_address": "1 Weir Lane", "idempotency_key": unique(),
            "total_cents": number(&cart["total_cents"])? + 1,
        });
        ann.post("/checkout", &agreed).await?.refused(StatusCode::CONFLICT, "cart_changed")?;

        let before = ann.available(product).await?;
        let order = ann.check_out(&unique()).await?.expect(StatusCode::CREATED)?;
        ensure!(order["status"] == "pending" && order["total_cents"] == cart["total_cents"], "{order}");
        ensure!(ann.available(product).await? < before, "placing an order reserved nothing");
        let cart = ann.get("/cart").await?.expect(StatusCode::OK)?;
        ensure!(list(&cart, "lines")?.is_empty(), "the cart is still full: {cart}");
        let history = ann.history().await?;
        ensure!(history.len() == 1 && history[0]["order"] == order["order"], "not in the history at once: {history:?}");

        let paid = ann.pay(&order, GOOD_CARD).await?.expect(StatusCode::OK)?;
        ensure!(paid["status"] == "paid", "{paid}");
        let seen = ann.order(&order).await?;
        ensure!(seen["status"] == "paid", "not paid at once after paying: {seen}");
        ensure!(list(&seen, "items")?.len() == 1 && seen["items"][0]["name"] == line["name"], "{seen}");
        ensure!(ann.history().await?[0]["status"] == "paid", "the history does not know of the payment");
        let page = ann.page(&format!("/orders/{}", order["order"].as_str().unwrap_or_default())).await?;
        ensure!(
            page.contains("Payment received") && page.contains("1 Weir Lane"),
            "the order's page lacks its history"
        );
        // Paying again, coming back twice: nothing happens twice.
        ann.pay(&order, GOOD_CARD).await?.expect(StatusCode::OK)?;
        let back = paid["return_url"].as_str().context("no way back")?;
        for _ in 0..2 {
            let target = leads_to(ann.client.get(back)).await?;
            ensure!(target.starts_with("/orders/"), "the way back leads to {target}");
        }
        let events = ann.order(&order).await?;
        let payments = list(&events, "events")?.iter().filter(|event| event["kind"] == "paid").count();
        ensure!(payments == 1, "paid {payments} times: {events}");
        ann.check_out(&unique()).await?.refused(StatusCode::CONFLICT, "empty_cart")?;
        Ok(order)
    }

    /// The outbox worker does its work, once.
    async fn receipt(&self, ann: &Visitor, order: &Value) -> Result<()> {
        let began = Instant::now();
        loop {
            let seen = ann.order(order).await?;
            let events = list(&seen, "events")?;
            let count = |kind: &str| events.iter().filter(|event| event["kind"] == kind).count();
            ensure!(count("receipt_sent") <= 1, "two receipts: {seen}");
            if count("receipt_sent") == 1 && count("confirmation_sent") == 1 {
                return Ok(());
            }
            ensure!(began.elapsed() < WAIT_MAX, "no receipt within {WAIT_MAX:?}: {seen}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn decline(&self, ann: &Visitor) -> Result<()> {
        let product = number(&self.stocked(ann, 2, 99, &[]).await?["product"]["id"])?;
        ann.put_in_cart(product, 1).await?;
        let order = ann.check_out(&unique()).await?.expect(StatusCode::CREATED)?;
        ann.pay(&order, DECLINED_CARD).await?.refused(StatusCode::PAYMENT_REQUIRED, "card_declined")?;
        ann.pay(&order, "1234").await?.refused(StatusCode::UNPROCESSABLE_ENTITY, "incorrect_number")?;
        let seen = ann.order(&order).await?;
        let failed = list(&seen, "events")?.iter().filter(|event| event["kind"] == "payment_failed").count();
        ensure!(seen["status"] == "pending" && failed == 1, "after a declined card: {seen}");
        // The customer tries another card, from the order's page.
        let reference = order["order"].as_str().unwrap_or_default();
        let again = ann.post(&format!("/orders/{reference}/pay"), &json!({})).await?.expect(StatusCode::OK)?;
        ensure!(again["payment_url"] == order["payment_url"], "one order, two payment pages: {order} {again}");
        ann.pay(&again, GOOD_CARD).await?.expect(StatusCode::OK)?;
        ensure!(ann.order(&order).await?["status"] == "paid", "the second card did not pay");
        let history = ann.history().await?;
        ensure!(history[0]["order"] == order["order"], "the latest order does not come first: {history:?}");
        ann.post(&format!("/orders/{reference}/pay"), &json!({})).await?.refused(StatusCode::CONFLICT, "not_payable")
    }

    async fn double_submit(&self, ann: &Visitor) -> Result<()> {
        let product = number(&self.stocked(ann, 4, 99, &[]).await?["product"]["id"])?;
        let (orders, stock) = (ann.history().await?.len(), ann.available(product).await?);
        ann.put_in_cart(product, 2).await?;
        let key = unique();
        let sent = futures_util::future::join_all((0..4).map(|_| ann.check_out(&key))).await;
        let mut references = Vec::new();
        for answer in sent {
            references.push(answer?.expect(StatusCode::CREATED)?["order"].clone());
        }
        let order = ann.check_out(&key).await?.expect(StatusCode::CREATED)?;
        references.push(order["order"].clone());
        references.dedup();
        ensure!(references.len() == 1, "one key made several orders: {references:?}");
        ensure!(ann.history().await?.len() == orders + 1, "one key made several rows in the history");
        ensure!(ann.available(product).await? == stock - 2, "one key reserved more than once");
        let other = json!({ "ship_name": "Someone Else", "ship_address": "Elsewhere", "idempotency_key": key });
        ann.post("/checkout", &other).await?.refused(StatusCode::UNPROCESSABLE_ENTITY, "key_misused")?;
        // Paid, so that no reservation of this run expires in the middle of a later one; and paid twice at once.
        let (one, two) = tokio::join!(ann.pay(&order, GOOD_CARD), ann.pay(&order, GOOD_CARD));
        one?.expect(StatusCode::OK)?;
        two?.expect(StatusCode::OK)?;
        let seen = ann.order(&order).await?;
        let paid = list(&seen, "events")?.iter().filter(|event| event["kind"] == "paid").count();
        ensure!(seen["status"] == "paid" && paid == 1, "after paying twice at once: {seen}");
        ensure!(ann.available(product).await? == stock - 2, "paying took stock once more");
        // And a repetition finds the order paid, with nothing left to pay.
        let again = ann.check_out(&key).await?.expect(StatusCode::CREATED)?;
        ensure!(again["status"] == "paid" && again["payment_url"].is_null(), "{again}");
        Ok(())
    }

    /// Two customers want the last unit at the same time: exactly one gets it.
    async fn oversell(&self) -> Result<()> {
        let early = self.customer("early").await?;
        let mut tried = Vec::new();
        let product = loop {
            ensure!(tried.len() < 5, "somebody else buys from every product this run chooses: {tried:?}");
            let found = self.stocked(&early, 1, 99, &tried).await?;
            let (product, left) = (number(&found["product"]["id"])?, number(&found["available"])?);
            tried.push(product);
            if left > 1 {
                early.put_in_cart(product, left - 1).await?;
                let order = early.check_out(&unique()).await?.expect(StatusCode::CREATED)?;
                early.pay(&order, GOOD_CARD).await?.expect(StatusCode::OK)?;
            }
            if early.available(product).await? == 1 {
                break product;
            }
        };
        let (one, two) = (self.customer("one").await?, self.customer("two").await?);
        for racer in [&one, &two] {
            racer.put_in_cart(product, 1).await?;
        }
        let (first_key, second_key) = (unique(), unique());
        let (first, second) = tokio::join!(one.check_out(&first_key), two.check_out(&second_key));
        let (first, second) = (first?, second?);
        let (winner, order, loser, refusal) =
            if first.status == StatusCode::CREATED { (&one, first, &two, second) } else { (&two, second, &one, first) };
        let order = order.expect(StatusCode::CREATED).context("nobody got the last unit")?;
        refusal.refused(StatusCode::CONFLICT, "sold_out").context("the last unit was sold twice")?;
        winner.pay(&order, GOOD_CARD).await?.expect(StatusCode::OK)?;
        ensure!(winner.order(&order).await?["status"] == "paid", "the winner has not paid");
        ensure!(loser.history().await?.is_empty(), "the loser has an order");
        ensure!(winner.available(product).await? == 0, "there is something left of the last unit");
        let page = loser.page("/cart").await?;
        ensure!(page.contains("Sold out"), "the loser's cart does not say what happened");
        loser.check_out(&unique()).await?.refused(StatusCode::CONFLICT, "sold_out")
    }

    /// The same with nothing but pages and forms.
    async fn buy_in_a_browser(&self) -> Result<()> {
        let visitor = self.visitor("browser")?;
        let product = number(&self.stocked(&visitor, 1, 99, &[]).await?["product"]["id"])?.to_string();
        let target = visitor.form("/cart", &[("product_id", &product), ("qty", "1")]).await?;
        ensure!(target == "/cart" && visitor.page("/cart").await?.contains("/checkout"), "the cart by form: {target}");
        let answer = leads_to(visitor.client.get(visitor.at("/checkout")).header(ACCEPT, "text/html")).await?;
        ensure!(answer == "/login?next=/checkout", "a guest at the checkout is led to {answer}");
        let fields = [("name", "Brook <b>"), ("email", &visitor.email), ("password", PASSWORD), ("next", "/checkout")];
        ensure!(visitor.form("/register", &fields).await? == "/checkout", "registering does not lead back");
        let page = visitor.page("/checkout").await?;
        ensure!(!page.contains("Brook <b>"), "a name was not escaped");
        let (key, total) = (field(&page, "idempotency_key")?, field(&page, "total_cents")?);
        let fields = [
            ("idempotency_key", key.as_str()),
            ("total_cents", &total),
            ("ship_name", "Brook"),
            ("ship_address", "2 Weir Lane"),
        ];
        let payment = visitor.form("/checkout", &fields).await?;
        ensure!(visitor.page(&payment).await?.contains("Card number"), "no payment page at {payment}");
        // As a browser: the payment page is another site's.
        let declined = visitor.client.post(&payment).header(ACCEPT, "text/html").form(&[("card", DECLINED_CARD)]);
        ensure!(declined.send().await?.text().await?.contains("declined"), "the payment page does not say declined");
        let paid = visitor.client.post(&payment).header(ACCEPT, "text/html").form(&[("card", GOOD_CARD)]);
        let back = leads_to(paid).await?;
        let order = leads_to(visitor.client.get(&back).header(ACCEPT, "text/html")).await?;
        let page = visitor.page(&order).await?;
        ensure!(page.contains("your order is paid") && page.contains("2 Weir Lane"), "the order's page after paying");
        ensure!(visitor.page("/orders").await?.contains(&order), "the order is not in the history's page");
        Ok(())
    }

    async fn strangers(&self, ann: &Visitor, order: &Value) -> Result<()> {
        let stranger = self.customer("stranger").await?;
        let reference = order["order"].as_str().unwrap_or_default();
        stranger.get(&format!("/orders/{reference}")).await?.refused(StatusCode::NOT_FOUND, "not_found")?;
        stranger
            .post(&format!("/orders/{reference}/pay"), &json!({}))
            .await?
            .refused(StatusCode::NOT_FOUND, "not_found")?;
        let mut forged = reference.to_owned();
        forged.replace_range(3..4, if reference[3..4] == *"a" { "b" } else { "a" });
        ann.get(&format!("/orders/{forged}")).await?.refused(StatusCode::NOT_FOUND, "not_found")?;
        // A form on another site, and a webhook that the provider did not sign.
        for (name, value) in [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")] {
            let request = ann.client.post(ann.at("/logout")).header(name, value).json(&json!({}));
            json_of(request).await?.refused(StatusCode::FORBIDDEN, "forbidden")?;
        }
        let event = json!({ "id": "evt_forged", "type": "checkout.session.completed", "created": 1, "data": { "object": {
            "id": "cs_forged", "url": "", "client_reference_id": reference, "amount_total": 1, "currency": "usd",
            "payment_status": "paid" } } });
        for signature in ["", "t=1,v1=00", "nonsense"] {
            let request =
                stranger.client.post(stranger.at("/webhooks/payments")).header("payment-signature", signature);
            json_of(request.json(&event)).await?.refused(StatusCode::BAD_REQUEST, "bad_request")?;
        }
        let bad = stranger.client.post(stranger.at("/cart")).header("content-type", "application/json").body("{");
        json_of(bad).await?.refused(StatusCode::BAD_REQUEST, "bad_request")?;
        stranger.get("/account").await?.expect(StatusCode::OK).map(drop)
    }

    async fn ended(&self, ann: &Visitor) -> Result<()> {
        ensure!(ann.form("/logout", &[]).await? == "/", "logging out does not lead to the front page");
        for path in ["/orders", "/account"] {
            ann.get(path).await?.refused(StatusCode::UNAUTHORIZED, "log_in")?;
        }
        Ok(())
    }

    /// At least: one bought, one after a decline, one double submitted, one for the last unit, one by forms.
    async fn reported(&self, began: &(i64, i64)) -> Result<()> {
        let (orders, revenue) = self.report().await?;
        ensure!(orders >= began.0 + 5, "the report went from {} to {orders} orders", began.0);
        ensure!(revenue > began.1, "the report went from {} to {revenue} cents", began.1);
        let visitor = self.visitor("owner")?;
        let report = visitor.get("/admin/report?days=7").await?.expect(StatusCode::OK)?;
        let sellers = list(&report, "best_sellers")?;
        ensure!(!sellers.is_empty() && sellers.len() <= 10, "{report}");
        let sold: Vec<i64> = sellers.iter().map(|seller| number(&seller["sold"])).collect::<Result<_>>()?;
        ensure!(sold.is_sorted_by(|more, less| more >= less), "best sellers out of order: {sold:?}");
        ensure!(visitor.page("/admin/report").await?.contains("Best sellers"), "the report has no page");
        Ok(())
    }
}
