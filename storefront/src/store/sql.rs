//! Every statement of the shop.
//!
//! Invariant: a statement on a keyed table names its key as `key = $n`, `key = ANY($n)` or a value of VALUES, so that the
//! rows it touches can be told from the statement and its parameters alone; the four that span keys (`EXPIRED_HOLDS`,
//! `WAITING_EVENTS` and the two reports) are plain reads. What a visitor reads again and again (catalogue, product, stock,
//! session) calls no clock and nothing random, so that equal statements have equal answers until someone writes.
//!
//! Key of each group: `user_id`, `product_id`, `email`; categories and products are reference data.

// --- catalogue (reference data) ---

/// All categories; small, so paging is the page's business.
pub const CATEGORIES: &str = "SELECT category_id,parent_id,slug,name FROM categories ORDER BY name";

/// One page of a category and its sub-categories after a product id; one more row than a page shows tells of a next page.
pub const PRODUCTS_IN_CATEGORY: &str = "SELECT product_id,category_id,name,brand,price_cents FROM products \
     WHERE category_id=ANY($1) AND active AND product_id>$2 ORDER BY product_id LIMIT 25";

/// The products the shop opens with.
pub const PRODUCTS_FEATURED: &str = "SELECT product_id,category_id,name,brand,price_cents FROM products \
     WHERE active ORDER BY product_id LIMIT 12";

/// Full text search, best match first.
pub const PRODUCTS_MATCHING: &str = "SELECT product_id,category_id,name,brand,price_cents FROM products \
     WHERE tsv @@ websearch_to_tsquery('simple',$1) AND active \
     ORDER BY ts_rank(tsv,websearch_to_tsquery('simple',$1)) DESC,product_id LIMIT 48";

/// One product with its category.
pub const PRODUCT: &str = "SELECT p.product_id,p.category_id,p.sku,p.name,p.brand,p.price_cents,p.active,\
     c.name AS category,c.slug AS category_slug \
     FROM products p JOIN categories c USING(category_id) WHERE p.product_id=$1";

/// The ids the catalogue gave to these article numbers.
pub const PRODUCT_IDS_BY_SKU: &str = "SELECT sku,product_id FROM products WHERE sku=ANY($1)";

// --- stock (key product_id) ---

/// Units available of several products.
pub const STOCK: &str = "SELECT product_id,available FROM inventory WHERE product_id=ANY($1)";

/// First stock of a new product; a product already known keeps what it has.
pub const STOCK_INSERT: &str = "INSERT INTO inventory(product_id,available) VALUES($1,$2) ON CONFLICT DO NOTHING";

/// Reserves; no row: this order already has a hold on this product.
pub const HOLD: &str = "INSERT INTO stock_holds(product_id,order_id,user_id,qty,expires_at) VALUES($1,$2,$3,$4,$5) \
     ON CONFLICT DO NOTHING";

/// Takes stock; no row: not enough left. With the CHECK on the column this is what makes overselling impossible.
pub const STOCK_TAKE: &str =
    "UPDATE inventory SET available=available-$2 WHERE product_id=$1 AND available>=$2 RETURNING available";

/// Gives stock back.
pub const STOCK_RETURN: &str = "UPDATE inventory SET available=available+$2 WHERE product_id=$1";

/// The hold of an order on a product.
pub const HOLD_GET: &str = "SELECT qty,state FROM stock_holds WHERE product_id=$1 AND order_id=$2";

/// Turns a hold into a sale; no row: it expired, or is sold already.
pub const HOLD_SELL: &str =
    "UPDATE stock_holds SET state='sold' WHERE product_id=$1 AND order_id=$2 AND state='held' RETURNING qty";

/// A late sale: the hold had expired. No row: this order has a hold or sale after all.
pub const HOLD_SELL_LATE: &str = "INSERT INTO stock_holds(product_id,order_id,user_id,qty,state,expires_at) \
     VALUES($1,$2,$3,$4,'sold',$5) ON CONFLICT DO NOTHING";

/// Removes a hold in a given state; what it returns goes back to stock.
pub const HOLD_RELEASE: &str = "DELETE FROM stock_holds WHERE product_id=$1 AND order_id=$2 AND state=$3 RETURNING qty";

/// Spans keys: holds whose time is up, for the sweeper to release one by one.
pub const EXPIRED_HOLDS: &str = "SELECT product_id,order_id,user_id,qty FROM stock_holds \
     WHERE state='held' AND expires_at<now() ORDER BY expires_at LIMIT 100";

// --- e-mail addresses (key email) ---

/// Claims an address; no row: someone has it.
pub const EMAIL_CLAIM: &str =
    "INSERT INTO user_emails(email,user_id) VALUES($1,$2) ON CONFLICT DO NOTHING RETURNING user_id";

/// Who has an address, and since when.
pub const EMAIL_OWNER: &str = "SELECT user_id,claimed_at FROM user_emails WHERE email=$1";

/// Removes a claim whose registration never finished.
pub const EMAIL_UNCLAIM: &str = "DELETE FROM user_emails WHERE email=$1 AND user_id=$2 AND claimed_at=$3";

// --- users and sessions (key user_id) ---

/// A guest: a user without an e-mail address.
pub const USER_INSERT_GUEST: &str = "INSERT INTO users(user_id) VALUES($1) ON CONFLICT DO NOTHING";

/// Makes a user, or makes the guest of that id one; repeating it with the same values changes nothing.
pub const USER_UPSERT: &str = "INSERT INTO users(user_id,email,name,pw_hash) VALUES($1,$2,$3,$4) \
     ON CONFLICT(user_id) DO UPDATE SET email=$2,name=$3,pw_hash=$4";

/// One user's account.
pub const USER: &str = "SELECT email,name,pw_hash FROM users WHERE user_id=$1";

/// Renames a user.
pub const USER_RENAME: &str = "UPDATE users SET name=$2 WHERE user_id=$1";

/// A new session.
pub const SESSION_INSERT: &str = "INSERT INTO sessions(user_id,token_hash,expires_at) VALUES($1,$2,$3)";

/// The visitor of a session; whether it has expired is judged by the caller, which keeps the clock out of the statement.
pub const SESSION_VISITOR: &str = "SELECT u.email,u.name,s.expires_at FROM sessions s JOIN users u USING(user_id) \
     WHERE s.user_id=$1 AND s.token_hash=$2";

/// Ends a session.
pub const SESSION_DELETE: &str = "DELETE FROM sessions WHERE user_id=$1 AND token_hash=$2";

// --- cart (key user_id) ---

/// The lines of a cart at today's prices.
pub const CART: &str = "SELECT c.product_id,p.name,p.category_id,c.qty,p.price_cents \
     FROM cart_items c JOIN products p USING(product_id) WHERE c.user_id=$1 ORDER BY p.name,c.product_id";

/// Units in a cart, for the badge.
pub const CART_COUNT: &str = "SELECT sum(qty) FROM cart_items WHERE user_id=$1";

/// Adds units to a line, up to the most a line may hold.
pub const CART_ADD: &str = "INSERT INTO cart_items(user_id,product_id,qty) VALUES($1,$2,$3) \
     ON CONFLICT(user_id,product_id) DO UPDATE SET qty=least(cart_items.qty+excluded.qty,99)";

/// Sets a line.
pub const CART_SET: &str = "INSERT INTO cart_items(user_id,product_id,qty) VALUES($1,$2,$3) \
     ON CONFLICT(user_id,product_id) DO UPDATE SET qty=excluded.qty";

/// Takes a guest's line over into an account. Repeating it after a crash changes nothing, hence not a sum.
pub const CART_MERGE: &str = "INSERT INTO cart_items(user_id,product_id,qty) VALUES($1,$2,$3) \
     ON CONFLICT(user_id,product_id) DO UPDATE SET qty=greatest(cart_items.qty,excluded.qty)";

/// Removes a line.
pub const CART_REMOVE: &str = "DELETE FROM cart_items WHERE user_id=$1 AND product_id=$2";

/// Empties a cart.
pub const CART_CLEAR: &str = "DELETE FROM cart_items WHERE user_id=$1";

// --- orders (key user_id) ---

/// Binds a request key to an order id; no row: a request with this key came before.
pub const KEY_CLAIM: &str =
    "INSERT INTO idempotency(user_id,key,request_hash,order_id) VALUES($1,$2,$3,$4) ON CONFLICT DO NOTHING";

/// What a request key is bound to.
pub const KEY_GET: &str = "SELECT request_hash,order_id FROM idempotency WHERE user_id=$1 AND key=$2";

/// Turns a cart into an order at today's prices.
pub const ORDER_INSERT: &str = "INSERT INTO orders(user_id,order_id,status,total_cents) \
     SELECT c.user_id,$2,'pending',sum(c.qty*p.price_cents) FROM cart_items c JOIN products p USING(product_id) \
     WHERE c.user_id=$1 GROUP BY 1 RETURNING total_cents";

/// Copies the cart's lines into the order, with the names and prices they had.
pub const ORDER_ITEMS_INSERT: &str = "INSERT INTO order_items(user_id,order_id,product_id,name,qty,price_cents) \
     SELECT c.user_id,$2,c.product_id,p.name,c.qty,p.price_cents FROM cart_items c JOIN products p USING(product_id) \
     WHERE c.user_id=$1 RETURNING product_id,qty,price_cents";

/// A user's latest orders.
pub const ORDERS: &str = "SELECT order_id,status,total_cents,created_at FROM orders WHERE user_id=$1 \
     ORDER BY created_at DESC LIMIT 50";

/// One order.
pub const ORDER: &str = "SELECT status,total_cents,created_at FROM orders WHERE user_id=$1 AND order_id=$2";

/// One order, locked until the transaction ends: who changes an order or adds an event takes this first.
pub const ORDER_LOCK: &str = "SELECT status,total_cents FROM orders WHERE user_id=$1 AND order_id=$2 FOR UPDATE";

/// Moves an order from one status to another; no row: it was elsewhere.
pub const ORDER_MOVE: &str =
    "UPDATE orders SET status=$4 WHERE user_id=$1 AND order_id=$2 AND status=$3 RETURNING total_cents";

/// The lines of an order.
pub const ORDER_ITEMS: &str = "SELECT product_id,name,qty,price_cents FROM order_items \
     WHERE user_id=$1 AND order_id=$2 ORDER BY name,product_id";

/// What happened to an order.
pub const ORDER_EVENTS: &str =
    "SELECT kind,data,at FROM order_events WHERE user_id=$1 AND order_id=$2 ORDER BY version";

/// The version of an order's last event.
pub const EVENT_LAST: &str = "SELECT max(version) FROM order_events WHERE user_id=$1 AND order_id=$2";

/// Adds an event.
pub const EVENT_INSERT: &str = "INSERT INTO order_events(user_id,order_id,version,kind,data) VALUES($1,$2,$3,$4,$5)";

// --- payments (key user_id) ---

/// Notes a payment session; no row: it is known.
pub const PAYMENT_INSERT: &str = "INSERT INTO payments(user_id,order_id,provider_ref,amount_cents,state) \
     VALUES($1,$2,$3,$4,$5) ON CONFLICT DO NOTHING";

/// The payment sessions of an order.
pub const PAYMENTS: &str = "SELECT provider_ref,amount_cents,state FROM payments WHERE user_id=$1 AND order_id=$2";

/// Notes what became of a payment.
pub const PAYMENT_SET: &str =
    "UPDATE payments SET state=$4 WHERE user_id=$1 AND order_id=$2 AND provider_ref=$3 AND state<>$4";

/// Remembers a webhook; no row: a replay.
pub const WEBHOOK_CLAIM: &str = "INSERT INTO webhook_events(user_id,event_id) VALUES($1,$2) ON CONFLICT DO NOTHING";

// --- outbox (key user_id) ---

/// Work to be done after the transaction it is part of.
pub const OUTBOX_INSERT: &str = "INSERT INTO outbox(user_id,event_id,topic,payload) VALUES($1,$2,$3,$4)";

/// Spans keys: events that wait for a worker. Only a hint; `OUTBOX_LEASE` decides who works on one.
pub const WAITING_EVENTS: &str = "SELECT user_id,event_id FROM outbox \
     WHERE done_at IS NULL AND lease_until<now() ORDER BY created_at LIMIT 50";

/// Takes one event for 30 seconds; no row: another worker was quicker.
pub const OUTBOX_LEASE: &str = "UPDATE outbox SET lease_until=now()+interval '30s',attempts=attempts+1 \
     WHERE user_id=$1 AND event_id=$2 AND done_at IS NULL AND lease_until<now() RETURNING topic,payload,attempts";

/// Ends an event; no row: it was ended before.
pub const OUTBOX_DONE: &str = "UPDATE outbox SET done_at=now() WHERE user_id=$1 AND event_id=$2 AND done_at IS NULL";

/// Sets an event aside that failed too often, for a person to look at.
pub const OUTBOX_PARK: &str = "UPDATE outbox SET lease_until='infinity' WHERE user_id=$1 AND event_id=$2";

// --- reports (span keys) ---

/// Sales per day since a time.
pub const REPORT_DAYS: &str = "SELECT date_trunc('day',created_at) AS day,count(*),sum(total_cents),avg(total_cents),\
     count(DISTINCT user_id) FROM orders WHERE created_at>=$1 GROUP BY 1 ORDER BY 1";

/// The ten products most sold since a time.
pub const REPORT_BEST_SELLERS: &str = "SELECT i.product_id,p.name,sum(i.qty) AS sold FROM order_items i \
     JOIN orders o USING(user_id,order_id) JOIN products p USING(product_id) \
     WHERE o.created_at>=$1 GROUP BY 1,2 ORDER BY sold DESC,1 LIMIT 10";

/// Answers if the database does.
pub const PING: &str = "SELECT 1";
