-- The shop's schema: plain PostgreSQL 15, no extension, no sequence, no trigger. Every statement can be run again.
-- The key of each group of tables is its first primary-key column; foreign keys stay inside a group or point at the
-- catalogue (categories, products), which every group may join.

CREATE TABLE IF NOT EXISTS categories(
  category_id int PRIMARY KEY,
  parent_id int,
  slug text UNIQUE NOT NULL,
  name text NOT NULL);

CREATE TABLE IF NOT EXISTS products(
  product_id bigint PRIMARY KEY,
  category_id int NOT NULL REFERENCES categories,
  sku text UNIQUE NOT NULL,
  name text NOT NULL,
  brand text,
  price_cents bigint NOT NULL CHECK (price_cents>=0),
  active bool NOT NULL DEFAULT true,
  tsv tsvector GENERATED ALWAYS AS (to_tsvector('simple', name||' '||coalesce(brand,''))) STORED);
CREATE INDEX IF NOT EXISTS products_by_category ON products(category_id,product_id);
CREATE INDEX IF NOT EXISTS products_by_words ON products USING gin(tsv);

-- key: email
CREATE TABLE IF NOT EXISTS user_emails(
  email text PRIMARY KEY,
  user_id bigint NOT NULL,
  claimed_at timestamptz NOT NULL DEFAULT now());

-- key: product_id
CREATE TABLE IF NOT EXISTS inventory(
  product_id bigint PRIMARY KEY REFERENCES products,
  available int NOT NULL CHECK (available>=0));
CREATE TABLE IF NOT EXISTS stock_holds(
  product_id bigint REFERENCES inventory,
  order_id uuid,
  user_id bigint NOT NULL,
  qty int NOT NULL CHECK (qty>0),
  state text NOT NULL DEFAULT 'held',
  expires_at timestamptz NOT NULL,
  PRIMARY KEY(product_id,order_id));
CREATE INDEX IF NOT EXISTS stock_holds_expiring ON stock_holds(expires_at) WHERE state='held';

-- key: user_id, for all that follow
CREATE TABLE IF NOT EXISTS users(
  user_id bigint PRIMARY KEY,
  email text,
  name text,
  pw_hash text,
  created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS sessions(
  user_id bigint REFERENCES users,
  token_hash bytea,
  expires_at timestamptz NOT NULL,
  PRIMARY KEY(user_id,token_hash));
CREATE TABLE IF NOT EXISTS cart_items(
  user_id bigint REFERENCES users,
  product_id bigint REFERENCES products,
  qty int NOT NULL CHECK (qty>0),
  PRIMARY KEY(user_id,product_id));
CREATE TABLE IF NOT EXISTS orders(
  user_id bigint REFERENCES users,
  order_id uuid,
  status text NOT NULL,
  total_cents bigint NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY(user_id,order_id));
CREATE INDEX IF NOT EXISTS orders_by_time ON orders(user_id,created_at DESC);
CREATE TABLE IF NOT EXISTS order_items(
  user_id bigint,
  order_id uuid,
  product_id bigint REFERENCES products,
  name text NOT NULL,
  qty int NOT NULL,
  price_cents bigint NOT NULL,
  PRIMARY KEY(user_id,order_id,product_id),
  FOREIGN KEY(user_id,order_id) REFERENCES orders);
CREATE TABLE IF NOT EXISTS order_events(
  user_id bigint,
  order_id uuid,
  version int,
  kind text NOT NULL,
  data jsonb NOT NULL DEFAULT '{}',
  at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY(user_id,order_id,version));
CREATE TABLE IF NOT EXISTS payments(
  user_id bigint,
  order_id uuid,
  provider_ref text,
  amount_cents bigint NOT NULL,
  state text NOT NULL,
  PRIMARY KEY(user_id,order_id,provider_ref));
CREATE TABLE IF NOT EXISTS webhook_events(
  user_id bigint,
  event_id text,
  PRIMARY KEY(user_id,event_id));
CREATE TABLE IF NOT EXISTS idempotency(
  user_id bigint,
  key text,
  request_hash bytea NOT NULL,
  order_id uuid NOT NULL,
  PRIMARY KEY(user_id,key));
CREATE TABLE IF NOT EXISTS outbox(
  user_id bigint,
  event_id uuid,
  topic text NOT NULL,
  payload jsonb NOT NULL,
  lease_until timestamptz NOT NULL DEFAULT '-infinity',
  attempts int NOT NULL DEFAULT 0,
  done_at timestamptz,
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY(user_id,event_id));
CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox(created_at) WHERE done_at IS NULL;
