//! Orders in the database: written with their events and outbox rows, read as they are and as they were.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use sqlx::{
    Connection, QueryBuilder, Row,
    postgres::{PgConnection, PgRow},
    types::Json,
};
use uuid::Uuid;

use super::{
    New, Store, is_duplicate,
    keys::{self, Answer, Key},
    refused,
};
use crate::{
    domain::{
        Amount, Currency, CustomerId, Event, Item, ItemName, MenuItemId, Notes, Order, OrderId, PaymentId,
        Reason, RestaurantId, Status, Traceparent,
    },
    error::{Error, Written},
};

const CREATE: &str = include_str!("create_order.sql");
const CHANGE: &str = include_str!("change_order.sql");

/// One row a line; an order has at least one.
const FIND: &str = "
SELECT order_id, status, version, customer_id, restaurant_id, currency, total_amount, created_at, updated_at, notes,
       payment_id, cancellation_reason, menu_item_id, name, price, quantity
FROM public.orders JOIN public.order_items USING (order_id)
WHERE order_id = $1
ORDER BY line_number";

const LOCK: &str = "SELECT 1 FROM public.orders WHERE order_id = $1 FOR UPDATE";

const EVENTS: &str = "
SELECT payload FROM public.order_events WHERE order_id = $1 AND version > $2 ORDER BY version LIMIT $3";

/// The version that an event of ours has become, if it was written.
const WRITTEN: &str = "SELECT version FROM public.order_events WHERE order_id = $1 AND event_id = $2";

pub(super) const STATEMENTS: [&str; 6] = [CREATE, CHANGE, FIND, LOCK, EVENTS, WRITTEN];

/// How many events are read at a time.
const EVENTS_PAGE: i64 = 100;

/// What is to become of an order.
#[derive(Debug)]
pub(crate) enum Decision {
    /// It is already as it should be.
    Keep(Answer),
    /// This event, after which it is so.
    Write(Box<Event>, Box<Order>, Answer),
}

/// Which orders; what is not given does not matter.
#[derive(Debug, Default)]
pub(crate) struct Filter {
    pub(crate) customer_id: Option<CustomerId>,
    /// Any of these; empty: of any.
    pub(crate) statuses: Vec<Status>,
    /// Placed then or later.
    pub(crate) created_from: Option<DateTime<Utc>>,
    /// Placed before.
    pub(crate) created_to: Option<DateTime<Utc>>,
    /// Those that come after this one in the list, which goes from the newest back.
    pub(crate) after: Option<(DateTime<Utc>, OrderId)>,
}

/// How an attempt to change an order ended.
enum Attempt {
    Done(Answer),
    /// Another changed it meanwhile.
    Overtaken,
}

impl Store {
    /// Writes a new order; gives back the answer after the commit, or the one that was given before for the same key.
    pub(crate) async fn create(
        &self,
        order: &Order,
        event: &Event,
        traceparent: Option<&Traceparent>,
        key: Option<&Key>,
        answer: &Answer,
    ) -> Result<Answer, Error> {
        self.once(&Placing { order, event, traceparent }, key, answer).await
    }

    /// Does with an order what `decide` says about it as it is. Who is overtaken decides again, with the order locked;
    /// `decide` must give the event the id `event_id` each time, because by it we know our own.
    pub(crate) async fn change(
        &self,
        id: &OrderId,
        event_id: Uuid,
        traceparent: Option<&Traceparent>,
        key: Option<&Key>,
        decide: impl Fn(&Order) -> Result<Decision, Error> + Sync,
    ) -> Result<Answer, Error> {
        let mut retry = self.writing();
        let mut lock = false;
        // What is answered for each version that an attempt tried to write, and may have written.
        let mut tried = BTreeMap::<i32, Answer>::new();
        loop {
            let doubt = retry.doubt;
            let work = async |c: &mut PgConnection| {
                let mut decide = |order: &Order| {
                    let decision = decide(order)?;
                    if let Decision::Write(event, _, answer) = &decision {
                        tried.insert(event.version, answer.clone());
                    }
                    Ok(decision)
                };
                let change = Change { id, traceparent, key };
                let attempt = if lock {
                    change.locked(c, &mut decide).await
                } else {
                    change.attempt(c, &mut decide).await
                };
                let failed = match attempt {
                    Ok(Ok(attempt)) => return Ok(Ok(attempt)),
                    Err(error) if !is_duplicate(&error) => return Err(error),
                    failed => failed,
                };
                // Perhaps because it has been done before: by an attempt whose end was not heard, or for the same key.
                if doubt
                    && let Some(version) = written(c, id, event_id).await?
                    && let Some(answer) = tried.remove(&version)
                {
                    return Ok(Ok(Attempt::Done(answer)));
                }
                match keys::known(c, key).await? {
                    Some(known) => Ok(known.map(Attempt::Done)),
                    None => failed,
                }
            };
            match self.with_connection(work).await {
                Ok(Ok(Attempt::Done(answer))) => return Ok(answer),
                Ok(Ok(Attempt::Overtaken)) => lock = true,
                Ok(Err(error)) => return Err(error),
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// The order's current state.
    pub(crate) async fn find(&self, id: &OrderId) -> Result<Option<Order>, Error> {
        let mut retry = self.reading();
        loop {
            match self.with_connection(async |c| find(c, id).await).await {
                Ok(order) => return Ok(order),
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// At most so many of the order's events after a version, in order.
    pub(crate) async fn events(&self, id: &OrderId, after: i32, most: i64) -> Result<Vec<Event>, Error> {
        let mut retry = self.reading();
        loop {
            let read = async |c: &mut PgConnection| -> Result<Vec<(Json<Event>,)>, sqlx::Error> {
                sqlx::query_as(EVENTS).bind(id.as_str()).bind(after).bind(most).fetch_all(c).await
            };
            match self.with_connection(read).await {
                Ok(rows) => return Ok(rows.into_iter().map(|(Json(event),)| event).collect()),
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// The order as it was at a version, or as it became last if it has not got there.
    pub(crate) async fn at_version(&self, id: &OrderId, version: i32) -> Result<Option<Order>, Error> {
        let mut order: Option<Order> = None;
        loop {
            let after = order.as_ref().map_or(0, |o| o.version);
            let most = EVENTS_PAGE.min(i64::from(version - after));
            let events = if most > 0 { self.events(id, after, most).await? } else { Vec::new() };
            if events.is_empty() {
                return Ok(order);
            }
            for event in &events {
                match &mut order {
                    Some(order) => order.apply(event),
                    None => order = Order::begin(event),
                }
            }
        }
    }

    /// At most so many orders, the newest first.
    pub(crate) async fn list(&self, filter: &Filter, most: i64) -> Result<Vec<Order>, Error> {
        let mut retry = self.reading();
        loop {
            match self.with_connection(async |c| list(filter, most).build().fetch_all(c).await).await {
                Ok(rows) => {
                    let id = |row: &PgRow| row.try_get::<String, _>("order_id").ok();
                    let orders = rows.chunk_by(|a, b| id(a) == id(b));
                    let orders: Result<_, _> = orders.filter_map(|rows| assemble(rows).transpose()).collect();
                    return orders.map_err(|e| refused(&e, Written::Nothing));
                }
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }
}

fn list(filter: &Filter, most: i64) -> QueryBuilder<sqlx::Postgres> {
    let mut query = QueryBuilder::new(
        "SELECT o.*, menu_item_id, name, price, quantity FROM (SELECT * FROM public.orders WHERE true",
    );
    if let Some(id) = &filter.customer_id {
        query.push(" AND customer_id = ").push_bind(id.as_str().to_owned());
    }
    match filter.statuses.as_slice() {
        [] => {}
        // So that the index on it gives the order by time, too.
        [only] => {
            query.push(" AND status = ").push_bind(only.as_str());
        }
        several => {
            let names: Vec<_> = several.iter().map(|s| s.as_str()).collect();
            query.push(" AND status = ANY(").push_bind(names).push(")");
        }
    }
    if let Some(from) = filter.created_from {
        query.push(" AND created_at >= ").push_bind(from);
    }
    if let Some(to) = filter.created_to {
        query.push(" AND created_at < ").push_bind(to);
    }
    if let Some((created_at, id)) = &filter.after {
        query.push(" AND (created_at, order_id) < (").push_bind(*created_at);
        query.push(", ").push_bind(id.as_str().to_owned()).push(")");
    }
    query.push(" ORDER BY created_at DESC, order_id DESC LIMIT ").push_bind(most);
    query.push(") o JOIN public.order_items i USING (order_id) ORDER BY o.created_at DESC, o.order_id DESC, line_number");
    query
}

async fn written(
    connection: &mut PgConnection,
    id: &OrderId,
    event_id: Uuid,
) -> Result<Option<i32>, sqlx::Error> {
    sqlx::query_scalar(WRITTEN).bind(id.as_str()).bind(event_id).fetch_optional(connection).await
}

async fn find(connection: &mut PgConnection, id: &OrderId) -> Result<Option<Order>, sqlx::Error> {
    let rows = sqlx::query(FIND).bind(id.as_str()).fetch_all(connection).await?;
    assemble(&rows)
}

/// A new order.
struct Placing<'a> {
    order: &'a Order,
    event: &'a Event,
    traceparent: Option<&'a Traceparent>,
}

impl New for Placing<'_> {
    async fn insert(
        &self,
        connection: &mut PgConnection,
        key: Option<&Key>,
        answer: &Answer,
    ) -> Result<(), sqlx::Error> {
        let (order, lines) = (self.order, Lines::of(&self.order.items));
        // `execute` reads up to ReadyForQuery. The command's own completion comes before the commit.
        keys::remembering(CREATE, key, answer)
            .bind(order.order_id.as_str())
            .bind(order.customer_id.as_str())
            .bind(order.restaurant_id.as_str())
            .bind(order.currency.as_str())
            .bind(order.total_amount.value())
            .bind(order.created_at)
            .bind(order.notes.as_ref().map(Notes::as_str))
            .bind(lines.ids)
            .bind(lines.names)
            .bind(lines.prices)
            .bind(lines.quantities)
            .bind(self.event.event_id)
            .bind(Json(self.event))
            .bind(self.traceparent.map(Traceparent::as_str))
            .execute(connection)
            .await
            .map(drop)
    }

    async fn is_written(&self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        Ok(written(connection, &self.order.order_id, self.event.event_id).await?.is_some())
    }

    fn duplicate(&self, error: &sqlx::Error) -> Error {
        if is_about_the_order(error) {
            return Error::OrderExists(self.order.order_id.to_string());
        }
        refused(error, Written::Nothing)
    }
}

/// One change, as often as it is tried.
struct Change<'a> {
    id: &'a OrderId,
    traceparent: Option<&'a Traceparent>,
    key: Option<&'a Key>,
}

impl Change<'_> {
    /// Reads, decides, writes, while nobody else can. The order is locked before it is read: a read that waits for the
    /// lock would see the order as it is then, but its lines as they were.
    async fn locked(
        &self,
        connection: &mut PgConnection,
        decide: &mut (dyn FnMut(&Order) -> Result<Decision, Error> + Send),
    ) -> Result<Result<Attempt, Error>, sqlx::Error> {
        let mut transaction = connection.begin().await?;
        sqlx::query(LOCK).bind(self.id.as_str()).execute(&mut *transaction).await?;
        let attempt = self.attempt(&mut transaction, decide).await;
        match &attempt {
            Ok(Ok(_)) => transaction.commit().await?,
            _ => transaction.rollback().await?,
        }
        attempt
    }

    /// Reads, decides, writes: nothing, if another has written in between.
    async fn attempt(
        &self,
        connection: &mut PgConnection,
        decide: &mut (dyn FnMut(&Order) -> Result<Decision, Error> + Send),
    ) -> Result<Result<Attempt, Error>, sqlx::Error> {
        let Some(before) = find(connection, self.id).await? else {
            return Ok(Err(Error::NoOrder(self.id.to_string())));
        };
        let (event, order, answer) = match decide(&before) {
            Ok(Decision::Write(event, order, answer)) => (event, order, answer),
            Ok(Decision::Keep(answer)) => return Ok(Ok(Attempt::Done(answer))),
            Err(error) => return Ok(Err(error)),
        };
        let lines = (order.items != before.items).then(|| Lines::of(&order.items));
        let done = keys::remembering(CHANGE, self.key, &answer)
            .bind(self.id.as_str())
            .bind(before.version)
            .bind(order.version)
            .bind(order.status.as_str())
            .bind(order.total_amount.value())
            .bind(order.notes.as_ref().map(Notes::as_str))
            .bind(order.payment_id.as_ref().map(PaymentId::as_str))
            .bind(order.cancellation_reason.as_ref().map(Reason::as_str))
            .bind(order.updated_at)
            .bind(lines.as_ref().map(|l| &l.ids))
            .bind(lines.as_ref().map(|l| &l.names))
            .bind(lines.as_ref().map(|l| &l.prices))
            .bind(lines.as_ref().map(|l| &l.quantities))
            .bind(event.event_id)
            .bind(event.body.type_name())
            .bind(Json(&event))
            .bind(self.traceparent.map(Traceparent::as_str))
            .execute(connection)
            .await?;
        Ok(Ok(if done.rows_affected() == 0 { Attempt::Overtaken } else { Attempt::Done(answer) }))
    }
}

/// An order's lines, column by column.
struct Lines<'a> {
    ids: Vec<&'a str>,
    names: Vec<&'a str>,
    prices: Vec<Decimal>,
    quantities: Vec<i32>,
}

impl<'a> Lines<'a> {
    fn of(items: &'a [Item]) -> Self {
        Self {
            ids: items.iter().map(|i| i.menu_item_id.as_str()).collect(),
            names: items.iter().map(|i| i.name.as_str()).collect(),
            prices: items.iter().map(|i| i.price.value()).collect(),
            quantities: items.iter().map(|i| i.quantity).collect(),
        }
    }
}

/// One order from the rows of its lines.
fn assemble(rows: &[PgRow]) -> Result<Option<Order>, sqlx::Error> {
    let Some(first) = rows.first() else { return Ok(None) };
    let decode = |what: String| sqlx::Error::Decode(what.into());
    let text = |row: &PgRow, column: &str| row.try_get::<String, _>(column);
    let optional = |column: &str| first.try_get::<Option<String>, _>(column);
    let currency = Currency::parse(text(first, "currency")?).map_err(decode)?;
    let amount = |row: &PgRow, column: &str| {
        row.try_get::<Decimal, _>(column).map(|value| Amount::of(value, currency.decimals()))
    };
    let items = rows.iter().map(|row| {
        Ok(Item {
            menu_item_id: MenuItemId::parse(text(row, "menu_item_id")?).map_err(decode)?,
            name: ItemName::parse(text(row, "name")?).map_err(decode)?,
            price: amount(row, "price")?,
            quantity: row.try_get("quantity")?,
        })
    });
    let status = text(first, "status")?;
    Ok(Some(Order {
        order_id: OrderId::parse(text(first, "order_id")?).map_err(decode)?,
        status: Status::parse(&status).ok_or_else(|| decode(format!("unknown status {status}")))?,
        version: first.try_get("version")?,
        customer_id: CustomerId::parse(text(first, "customer_id")?).map_err(decode)?,
        restaurant_id: RestaurantId::parse(text(first, "restaurant_id")?).map_err(decode)?,
        total_amount: amount(first, "total_amount")?,
        items: items.collect::<Result<_, sqlx::Error>>()?,
        notes: optional("notes")?.map(Notes::parse).transpose().map_err(decode)?,
        payment_id: optional("payment_id")?.map(PaymentId::parse).transpose().map_err(decode)?,
        cancellation_reason: optional("cancellation_reason")?
            .map(Reason::parse)
            .transpose()
            .map_err(decode)?,
        created_at: first.try_get("created_at")?,
        updated_at: first.try_get("updated_at")?,
        currency,
    }))
}

/// Whether a duplicate is one of the order's id, rather than of an event's. Which of an existing order's rows is met first
/// is the server's choice.
fn is_about_the_order(duplicate: &sqlx::Error) -> bool {
    let constraint = duplicate.as_database_error().and_then(|e| e.constraint());
    matches!(constraint, Some("orders_pkey" | "order_items_pkey" | "order_events_pkey"))
}
