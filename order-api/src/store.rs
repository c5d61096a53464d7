//! The orders database. An order, its lines, its event and its outbox row are one statement, which is a
//! transaction of its own: one round trip.

use std::{sync::Arc, time::Duration};

use prometheus_client::metrics::counter::Counter;
use rust_decimal::Decimal;
use sqlx::{
    Row,
    postgres::{PgConnection, PgRow},
    types::Json,
};
use tokio::time::timeout;

use crate::{
    domain::{
        Amount, Currency, CustomerId, Event, Item, ItemName, MenuItemId, Order, OrderId, RestaurantId,
        Status, Traceparent,
    },
    error::{Error, Written},
    pool::Pool,
};

/// All four inserts happen or none; the lines keep their order by their number.
const CREATE: &str = "
WITH new_order AS (
    INSERT INTO public.orders (order_id, customer_id, restaurant_id, status, version, currency, total_amount,
                               created_at, updated_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)
), new_items AS (
    INSERT INTO public.order_items (order_id, line_number, menu_item_id, name, price, quantity)
    SELECT $1, line_number, menu_item_id, name, price, quantity
    FROM unnest($9::text[], $10::text[], $11::numeric[], $12::integer[])
         WITH ORDINALITY AS line (menu_item_id, name, price, quantity, line_number)
), new_event AS (
    INSERT INTO public.order_events (order_id, version, event_id, event_type, payload, occurred_at)
    VALUES ($1, $5, $13, $14, $15, $8)
)
INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload, traceparent)
VALUES ($13, 'order', $1, $14, $15, $16)";

/// One row a line; an order has at least one.
const FIND: &str = "
SELECT status, version, customer_id, restaurant_id, currency, total_amount, created_at, updated_at,
       menu_item_id, name, price, quantity
FROM public.orders JOIN public.order_items USING (order_id)
WHERE order_id = $1
ORDER BY line_number";

/// `admin_shutdown`: somebody ended this connection, not the server.
const ADMIN_SHUTDOWN: &str = "57P01";

/// What the schema must be able to parse.
pub(crate) const STATEMENTS: [&str; 2] = [CREATE, FIND];

/// The statements, each on a connection of the pool and with a bound.
#[derive(Debug)]
pub(crate) struct Store {
    pool: Arc<Pool>,
    answer_timeout: Duration,
    retries: Counter,
}

/// How a statement failed.
enum Trouble {
    /// No connection: the statement was not sent.
    NotSent(sqlx::Error),
    /// The connection was lost, or the answer did not come: the statement may have taken effect.
    Lost(sqlx::Error),
    /// The answer did not come in time; the connection is closed.
    Silent,
    /// The server refused; it took no effect.
    Refused(sqlx::Error),
}

impl Store {
    pub(crate) fn new(pool: Arc<Pool>, answer_timeout: Duration, retries: Counter) -> Self {
        Self { pool, answer_timeout, retries }
    }

    /// Writes a new order with its event and outbox row; returns after the commit.
    ///
    /// A lost connection is tried again on another, as often as there may be dead ones. That is safe, because the order's and the event's ids stay
    /// the same: if the first attempt did commit, the second finds it there (or waits for it on the index).
    pub(crate) async fn create(
        &self,
        order: &Order,
        event: &Event,
        traceparent: Option<&Traceparent>,
    ) -> Result<(), Error> {
        let mut written = Written::Nothing;
        for _ in 0..=self.pool.max_connections() {
            let trouble =
                match self.with_connection(async |c| insert(c, order, event, traceparent).await).await {
                    Ok(()) => return Ok(()),
                    Err(trouble) => trouble,
                };
            match trouble {
                Trouble::Refused(e) if written == Written::Unknown && is_duplicate(&e) => return Ok(()),
                Trouble::Lost(e) => {
                    written = Written::Unknown;
                    self.retries.inc();
                    tracing::debug!(error = describe(&e), "lost the connection, trying another");
                }
                Trouble::Silent => return Err(unavailable(Written::Unknown, "no answer in time")),
                // Killed while it was being made, as a person or a failover does to all of them.
                Trouble::NotSent(e) if sqlstate(&e).as_deref() == Some(ADMIN_SHUTDOWN) => {}
                Trouble::NotSent(e) => return Err(unavailable(written, &describe(&e))),
                Trouble::Refused(e) => return Err(refused(&e, written)),
            }
        }
        Err(unavailable(written, "every connection was lost"))
    }

    /// The order's current state.
    pub(crate) async fn find(&self, id: &OrderId) -> Result<Option<Order>, Error> {
        for _ in 0..=self.pool.max_connections() {
            let query = async |c: &mut PgConnection| sqlx::query(FIND).bind(id.as_str()).fetch_all(c).await;
            match self.with_connection(query).await {
                Ok(rows) => return assemble(id, &rows).map_err(|e| refused(&e, Written::Nothing)),
                Err(Trouble::Lost(_)) => self.retries.inc(),
                Err(Trouble::Silent) => return Err(unavailable(Written::Nothing, "no answer in time")),
                Err(Trouble::NotSent(e)) => return Err(unavailable(Written::Nothing, &describe(&e))),
                Err(Trouble::Refused(e)) => return Err(refused(&e, Written::Nothing)),
            };
        }
        Err(unavailable(Written::Nothing, "every connection was lost"))
    }

    /// Runs one statement on a connection of the pool, within the time for an answer.
    async fn with_connection<T>(
        &self,
        statement: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Trouble> {
        let mut lease = self.pool.acquire().await.map_err(Trouble::NotSent)?;
        match timeout(self.answer_timeout, statement(&mut lease.connection)).await {
            Ok(Ok(answer)) => {
                lease.give_back();
                Ok(answer)
            }
            Ok(Err(e)) if is_lost(&e) => Err(Trouble::Lost(e)),
            Ok(Err(e)) => Err(Trouble::Refused(e)),
            Err(_) => Err(Trouble::Silent),
        }
    }
}

async fn insert(
    connection: &mut PgConnection,
    order: &Order,
    event: &Event,
    traceparent: Option<&Traceparent>,
) -> Result<(), sqlx::Error> {
    let items = &order.items;
    // `execute` reads up to ReadyForQuery. The command's own completion comes before the commit.
    sqlx::query(CREATE)
        .bind(order.order_id.as_str())
        .bind(order.customer_id.as_str())
        .bind(order.restaurant_id.as_str())
        .bind(order.status.as_str())
        .bind(order.version)
        .bind(order.currency.as_str())
        .bind(order.total_amount.value())
        .bind(order.created_at)
        .bind(items.iter().map(|i| i.menu_item_id.as_str()).collect::<Vec<_>>())
        .bind(items.iter().map(|i| i.name.as_str()).collect::<Vec<_>>())
        .bind(items.iter().map(|i| i.price.value()).collect::<Vec<_>>())
        .bind(items.iter().map(|i| i.quantity).collect::<Vec<_>>())
        .bind(event.event_id)
        .bind(event.event_type.as_str())
        .bind(Json(event))
        .bind(traceparent.map(Traceparent::as_str))
        .execute(connection)
        .await
        .map(drop)
}

fn assemble(id: &OrderId, rows: &[PgRow]) -> Result<Option<Order>, sqlx::Error> {
    let Some(first) = rows.first() else { return Ok(None) };
    let decode = |what: String| sqlx::Error::Decode(what.into());
    let currency = Currency::parse(first.try_get::<String, _>("currency")?).map_err(decode)?;
    let amount = |row: &PgRow, column: &str| {
        row.try_get::<Decimal, _>(column).map(|value| Amount::of(value, currency.decimals()))
    };
    let items = rows.iter().map(|row| {
        Ok(Item {
            menu_item_id: MenuItemId::parse(row.try_get::<String, _>("menu_item_id")?).map_err(decode)?,
            name: ItemName::parse(row.try_get::<String, _>("name")?).map_err(decode)?,
            price: amount(row, "price")?,
            quantity: row.try_get("quantity")?,
        })
    });
    let status: String = first.try_get("status")?;
    Ok(Some(Order {
        order_id: id.clone(),
        status: Status::parse(&status).ok_or_else(|| decode(format!("unknown status {status}")))?,
        version: first.try_get("version")?,
        customer_id: CustomerId::parse(first.try_get::<String, _>("customer_id")?).map_err(decode)?,
        restaurant_id: RestaurantId::parse(first.try_get::<String, _>("restaurant_id")?).map_err(decode)?,
        total_amount: amount(first, "total_amount")?,
        items: items.collect::<Result<_, sqlx::Error>>()?,
        created_at: first.try_get("created_at")?,
        updated_at: first.try_get("updated_at")?,
        currency,
    }))
}

/// The error in one line, without secrets: SQLSTATE and message where the server spoke.
pub(crate) fn describe(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(e) => format!("{} ({})", e.message(), e.code().unwrap_or_default()),
        sqlx::Error::PoolTimedOut => "no connection in time: the database is away or all are busy".into(),
        other => other.to_string(),
    }
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).map(Into::into)
}

/// Whether the connection is gone. The administrator's shutdown (57P01 to 57P03) may come after the commit.
fn is_lost(error: &sqlx::Error) -> bool {
    match sqlstate(error) {
        Some(code) => code.starts_with("57P") || code.starts_with("08"),
        None => matches!(error, sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_)),
    }
}

fn is_duplicate(error: &sqlx::Error) -> bool {
    sqlstate(error).as_deref() == Some("23505")
}

fn unavailable(written: Written, why: &str) -> Error {
    tracing::warn!(why, ?written, "the database does not serve us");
    Error::Unavailable(written)
}

/// What the server refused is either a state of the server, which passes or which its operator ends, or a bug
/// of ours.
fn refused(error: &sqlx::Error, written: Written) -> Error {
    let code = sqlstate(error).unwrap_or_default();
    let class = code.get(..2).unwrap_or_default();
    // Cancelled by a timeout or a person, out of resources, rolled back by concurrency, a standby, no
    // permission or schema, no such role or database.
    let passes = matches!(class, "57" | "53" | "40" | "42" | "28" | "3D" | "58")
        || matches!(code.as_str(), "25006" | "55P03");
    if passes {
        return unavailable(written, &describe(error));
    }
    tracing::error!(error = describe(error), "a statement failed");
    Error::Internal
}
