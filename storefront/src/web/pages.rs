//! The pages: what each template is given, prepared so that the templates only place it.
//!
//! Invariant: templates escape everything but the drawings made by `tile`, which contain no text.

use askama::Template;
use axum::http::header;
use axum::response::{Html, IntoResponse as _, Response};
use serde::{Deserialize as _, Deserializer, de};
use time::OffsetDateTime;
use time::macros::format_description;

use super::Shared;
use super::problem::Problem;
use super::session::Visitor;
use super::tile;
use crate::id::{CategoryId, ProductId};
use crate::money::Cents;
use crate::store::cart::{self, Line, QUANTITY_MAX};
use crate::store::catalog::{self, Category, Listed, Product};
use crate::store::orders::{Event, Item, Order, Status};
use crate::store::report::{Day, Seller};

fn respond(page: &impl Template) -> Result<Response, Problem> {
    let html = page.render().map_err(|error| {
        tracing::error!(%error, "a page could not be rendered");
        Problem::internal()
    })?;
    Ok(([(header::CONTENT_TYPE, "text/html; charset=utf-8")], Html(html)).into_response())
}

/// The categories as a tree of two levels.
pub struct Aisles {
    all: Vec<Category>,
}

impl Aisles {
    /// From the list of all categories.
    pub fn of(all: Vec<Category>) -> Self {
        Self { all }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Categories without a parent.
    pub fn top(&self) -> impl Iterator<Item = &Category> {
        self.all.iter().filter(|category| category.parent.is_none())
    }

    /// The sub-categories of one.
    pub fn under<'a>(&'a self, id: &'a CategoryId) -> impl Iterator<Item = &'a Category> {
        self.all.iter().filter(move |category| category.parent == Some(*id))
    }

    /// By the name in addresses.
    pub fn by_slug(&self, slug: &str) -> Option<&Category> {
        self.all.iter().find(|category| category.slug == slug)
    }

    /// A category and what is under it.
    pub fn family(&self, id: CategoryId) -> Vec<CategoryId> {
        std::iter::once(id).chain(self.under(&id).map(|category| category.id)).collect()
    }

    fn get(&self, id: CategoryId) -> Option<&Category> {
        self.all.iter().find(|category| category.id == id)
    }

    fn parent_of(&self, category: &Category) -> Option<&Category> {
        category.parent.and_then(|parent| self.get(parent))
    }

    /// A drawing for a product.
    fn tile(&self, product: ProductId, name: &str, category: Option<CategoryId>) -> String {
        let category = category.and_then(|id| self.get(id));
        let parent = category.and_then(|category| self.parent_of(category));
        let category_name = category.map_or("", |category| &category.name);
        let group = parent.map_or(category_name, |parent| &parent.name);
        tile::svg(product.0, &[name, category_name, group], group)
    }

    fn category_tile(category: &Category) -> String {
        tile::svg(i64::from(category.id.0), &[&category.name], &category.name)
    }
}

/// What every page has around it.
pub struct Frame {
    title: String,
    style: String,
    script: String,
    icon: String,
    customer: Option<String>,
    cart_count: i64,
    /// What stands in the search box.
    pub query: String,
    /// The categories.
    pub aisles: Aisles,
}

impl Frame {
    /// Reads what the frame shows.
    pub async fn load(shop: &Shared, visitor: Option<&Visitor>, title: &str) -> Result<Self, Problem> {
        let aisles = Aisles::of(catalog::categories(&shop.db).await?);
        Self::with(shop, visitor, title, aisles).await
    }

    /// The same with categories that have been read.
    pub async fn with(shop: &Shared, visitor: Option<&Visitor>, title: &str, aisles: Aisles) -> Result<Self, Problem> {
        let mut frame = Self::bare(shop, title);
        frame.aisles = aisles;
        if let Some(visitor) = visitor {
            frame.cart_count = cart::count(&shop.db, visitor.user).await?;
            let name = visitor.name.clone().unwrap_or_else(|| "Account".into());
            frame.customer = visitor.is_customer().then_some(name);
        }
        Ok(frame)
    }

    /// Without anything from the database.
    fn bare(shop: &Shared, title: &str) -> Self {
        Self {
            title: title.to_owned(),
            style: shop.assets.style(),
            script: shop.assets.script(),
            icon: shop.assets.icon(),
            customer: None,
            cart_count: 0,
            query: String::new(),
            aisles: Aisles::of(Vec::new()),
        }
    }
}

/// A product in a list.
struct Card {
    id: ProductId,
    name: String,
    brand: String,
    price: Cents,
    available: i32,
    tile: String,
}

/// A list of products.
pub struct Shelf {
    cards: Vec<Card>,
}

impl Shelf {
    /// Adds stock figures and drawings to products.
    pub async fn stocked(shop: &Shared, products: Vec<Listed>, aisles: &Aisles) -> Result<Self, Problem> {
        let ids: Vec<ProductId> = products.iter().map(|product| product.id).collect();
        let stock = catalog::stock(&shop.db, &ids).await?;
        let card = |(product, available): (Listed, i32)| Card {
            tile: aisles.tile(product.id, &product.name, Some(product.category)),
            id: product.id,
            name: product.name,
            brand: product.brand,
            price: product.price_cents,
            available,
        };
        Ok(Self { cards: products.into_iter().zip(stock).map(card).collect() })
    }
}

#[derive(Template)]
#[template(path = "home.html")]
struct Home {
    frame: Frame,
    shelf: Shelf,
    tiles: Vec<(Category, String, usize)>,
}

pub(super) fn home(frame: Frame, shelf: Shelf) -> Result<Response, Problem> {
    let tiles = frame
        .aisles
        .top()
        .map(|category| (category.clone(), Aisles::category_tile(category), frame.aisles.under(&category.id).count()));
    let tiles = tiles.collect();
    respond(&Home { frame, shelf, tiles })
}

#[derive(Template)]
#[template(path = "category.html")]
struct CategoryPage {
    frame: Frame,
    category: Category,
    parent: Option<Category>,
    siblings: Vec<Category>,
    shelf: Shelf,
    later: bool,
    next: Option<ProductId>,
}

pub(super) fn category(
    frame: Frame,
    category: Category,
    shelf: Shelf,
    later: bool,
    next: Option<ProductId>,
) -> Result<Response, Problem> {
    let parent = frame.aisles.parent_of(&category).cloned();
    let top = category.parent.unwrap_or(category.id);
    let siblings = frame.aisles.under(&top).cloned().collect();
    respond(&CategoryPage { frame, category, parent, siblings, shelf, later, next })
}

#[derive(Template)]
#[template(path = "search.html")]
struct SearchPage {
    frame: Frame,
    words: String,
    shelf: Shelf,
}

pub(super) fn search(frame: Frame, words: String, shelf: Shelf) -> Result<Response, Problem> {
    respond(&SearchPage { frame, words, shelf })
}

#[derive(Template)]
#[template(path = "product.html")]
struct ProductPage {
    frame: Frame,
    product: Product,
    parent: Option<Category>,
    available: i32,
    tile: String,
    shelf: Shelf,
    most: i32,
}

pub(super) fn product(frame: Frame, product: Product, available: i32, shelf: Shelf) -> Result<Response, Problem> {
    let tile = frame.aisles.tile(product.id, &product.name, Some(product.category_id));
    let parent = frame.aisles.get(product.category_id).and_then(|category| frame.aisles.parent_of(category)).cloned();
    let most = available.clamp(1, QUANTITY_MAX);
    respond(&ProductPage { frame, product, parent, available, tile, shelf, most })
}

/// A line of a cart or an order.
struct LineView {
    id: ProductId,
    name: String,
    qty: i32,
    price: Cents,
    sum: Cents,
    tile: String,
    warning: Option<String>,
}

fn line_views(aisles: &Aisles, lines: &[Line], stock: &[i32]) -> Vec<LineView> {
    let view = |(index, line): (usize, &Line)| LineView {
        id: line.product_id,
        name: line.name.clone(),
        qty: line.qty,
        price: line.price_cents,
        sum: line.price_cents.times(line.qty).unwrap_or_default(),
        tile: aisles.tile(line.product_id, &line.name, Some(line.category)),
        warning: match stock.get(index) {
            Some(0) => Some("Sold out".into()),
            Some(left) if *left < line.qty => Some(format!("Only {left} left")),
            _ => None,
        },
    };
    lines.iter().enumerate().map(view).collect()
}

#[derive(Template)]
#[template(path = "cart.html")]
struct CartPage {
    frame: Frame,
    lines: Vec<LineView>,
    total: Cents,
    blocked: bool,
}

pub(super) fn cart(frame: Frame, lines: &[Line], stock: &[i32]) -> Result<Response, Problem> {
    let views = line_views(&frame.aisles, lines, stock);
    let blocked = views.iter().any(|line| line.warning.is_some());
    respond(&CartPage { frame, lines: views, total: cart::total(lines), blocked })
}

#[derive(Template)]
#[template(path = "checkout.html")]
struct CheckoutPage {
    frame: Frame,
    lines: Vec<LineView>,
    total: Cents,
    name: String,
    key: String,
    problem: Option<String>,
}

pub(super) fn checkout(
    frame: Frame,
    visitor: &Visitor,
    lines: &[Line],
    key: &str,
    problem: Option<&str>,
) -> Result<Response, Problem> {
    let views = line_views(&frame.aisles, lines, &[]);
    respond(&CheckoutPage {
        frame,
        lines: views,
        total: cart::total(lines),
        name: visitor.name.clone().unwrap_or_default(),
        key: key.to_owned(),
        problem: problem.map(str::to_owned),
    })
}

/// What a form shows when it is shown again.
pub struct Form {
    /// The name entered.
    pub name: String,
    /// The address entered.
    pub email: String,
    /// Where to go afterwards.
    pub next: String,
    /// What was wrong.
    pub problem: Option<String>,
}

impl Form {
    /// Nothing entered yet.
    pub fn empty(next: &str) -> Self {
        Self { name: String::new(), email: String::new(), next: next.to_owned(), problem: None }
    }
}

#[derive(Template)]
#[template(path = "register.html")]
struct RegisterPage<'a> {
    frame: Frame,
    form: &'a Form,
}

pub(super) fn register(frame: Frame, form: &Form) -> Result<Response, Problem> {
    respond(&RegisterPage { frame, form })
}

#[derive(Template)]
#[template(path = "login.html")]
struct LoginPage<'a> {
    frame: Frame,
    form: &'a Form,
}

pub(super) fn login(frame: Frame, form: &Form) -> Result<Response, Problem> {
    respond(&LoginPage { frame, form })
}

#[derive(Template)]
#[template(path = "account.html")]
struct AccountPage {
    frame: Frame,
    name: String,
    email: String,
}

pub(super) fn account(frame: Frame, visitor: &Visitor) -> Result<Response, Problem> {
    let (name, email) = (visitor.name.clone().unwrap_or_default(), visitor.email.clone().unwrap_or_default());
    respond(&AccountPage { frame, name, email })
}

fn day(at: OffsetDateTime) -> String {
    at.format(format_description!("[day padding:none] [month repr:short] [year]")).unwrap_or_default()
}

fn moment(at: OffsetDateTime) -> String {
    at.format(format_description!("[day padding:none] [month repr:short] [year], [hour]:[minute] UTC"))
        .unwrap_or_default()
}

struct OrderView {
    reference: String,
    short: String,
    status: Status,
    total: Cents,
    placed: String,
}

fn order_view(order: &Order, reference: String) -> OrderView {
    // The end of the reference is its signature: short, and different for every order.
    let short = reference.get(38..).unwrap_or_default().to_uppercase();
    OrderView { reference, short, status: order.status, total: order.total, placed: day(order.created_at) }
}

#[derive(Template)]
#[template(path = "orders.html")]
struct OrdersPage {
    frame: Frame,
    orders: Vec<OrderView>,
}

pub(super) fn orders(frame: Frame, orders: &[Order], references: Vec<String>) -> Result<Response, Problem> {
    let orders = orders.iter().zip(references).map(|(order, reference)| order_view(order, reference)).collect();
    respond(&OrdersPage { frame, orders })
}

struct EventView {
    title: &'static str,
    detail: String,
    at: String,
    bad: bool,
}

fn event_view(event: &Event) -> EventView {
    let text = |key: &str| event.data[key].as_str().unwrap_or_default().to_owned();
    let (title, detail, bad) = match event.kind.as_str() {
        "placed" => ("Order placed", format!("Ships to {}, {}", text("ship_name"), text("ship_address")), false),
        "confirmation_sent" => ("Confirmation sent", String::new(), false),
        "payment_failed" => ("Payment failed", text("reason").replace('_', " "), true),
        "paid" => ("Payment received", String::new(), false),
        "receipt_sent" => ("Receipt sent", String::new(), false),
        "expired" => ("Reservation expired", "The order was not paid in time.".into(), true),
        "refunded" => ("Refund started", "The payment came too late for the stock.".into(), true),
        "money_returned" => ("Money returned", String::new(), false),
        _ => ("Updated", String::new(), false),
    };
    EventView { title, detail, at: moment(event.at), bad }
}

#[derive(Template)]
#[template(path = "order.html")]
struct OrderPage {
    frame: Frame,
    order: OrderView,
    lines: Vec<LineView>,
    events: Vec<EventView>,
}

pub(super) fn order(
    frame: Frame,
    reference: &str,
    order: &Order,
    (items, categories): (&[Item], &[Option<CategoryId>]),
    events: &[Event],
) -> Result<Response, Problem> {
    let view = |(item, category): (&Item, &Option<CategoryId>)| LineView {
        id: item.product_id,
        name: item.name.clone(),
        qty: item.qty,
        price: item.price_cents,
        sum: item.price_cents.times(item.qty).unwrap_or_default(),
        tile: frame.aisles.tile(item.product_id, &item.name, *category),
        warning: None,
    };
    let lines = items.iter().zip(categories).map(view).collect();
    let order = order_view(order, reference.to_owned());
    respond(&OrderPage { frame, order, lines, events: events.iter().map(event_view).collect() })
}

struct DayView {
    day: String,
    orders: i64,
    revenue: Cents,
    average: Cents,
    customers: i64,
    percent: i64,
}

#[derive(Template)]
#[template(path = "report.html")]
struct ReportPage<'a> {
    frame: Frame,
    span: i64,
    days: Vec<DayView>,
    sellers: Vec<(&'a Seller, i64)>,
    orders: i64,
    revenue: Cents,
    average: Cents,
}

fn percent(part: i64, whole: i64) -> i64 {
    if whole <= 0 { 0 } else { (i128::from(part) * 100 / i128::from(whole)) as i64 }
}

pub(super) fn report(frame: Frame, span: i64, days: &[Day], sellers: &[Seller]) -> Result<Response, Problem> {
    let most = days.iter().map(|day| day.revenue_cents.0).max().unwrap_or(0);
    let top = sellers.iter().map(|seller| seller.sold).max().unwrap_or(0);
    let (orders, revenue) = days.iter().fold((0, 0), |sum, day| (sum.0 + day.orders, sum.1 + day.revenue_cents.0));
    let view = |entry: &Day| DayView {
        day: day(entry.day),
        orders: entry.orders,
        revenue: entry.revenue_cents,
        average: entry.average_cents,
        customers: entry.customers,
        percent: percent(entry.revenue_cents.0, most),
    };
    respond(&ReportPage {
        frame,
        span,
        days: days.iter().rev().map(view).collect(),
        sellers: sellers.iter().map(|seller| (seller, percent(seller.sold, top))).collect(),
        orders,
        revenue: Cents(revenue),
        average: Cents(if orders > 0 { revenue / orders } else { 0 }),
    })
}

#[derive(Template)]
#[template(path = "problem.html")]
struct ProblemPage {
    frame: Frame,
    status: u16,
    headline: &'static str,
    message: String,
}

/// A page that says what went wrong, without the database, which may be what went wrong.
pub(super) fn problem(shop: &Shared, problem: &Problem) -> Response {
    let headline = match problem.status.as_u16() {
        404 => "We could not find that",
        403 => "That is not allowed",
        409 => "That did not work out",
        502 | 503 => "We will be right back",
        400..=499 => "That request did not work",
        _ => "Something went wrong",
    };
    let page = ProblemPage {
        frame: Frame::bare(shop, headline),
        status: problem.status.as_u16(),
        headline,
        message: problem.message.clone(),
    };
    respond(&page).unwrap_or_else(|_| problem.status.into_response())
}

/// A number sent as a JSON number or, by forms, as text.
pub(super) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    optional_number(deserializer)?.ok_or_else(|| de::Error::custom("a number is missing"))
}

/// The same, where nothing or an empty text means none.
pub(super) fn optional_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(i64),
        Text(String),
    }
    match Option::<Either>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Either::Number(number)) => Ok(Some(number)),
        Some(Either::Text(text)) if text.trim().is_empty() => Ok(None),
        Some(Either::Text(text)) => text.trim().parse().map(Some).map_err(|_| de::Error::custom("not a whole number")),
    }
}
