//! What may be done with an order: command and state in, event or refusal out.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{
    Amount, Currency, Details, Event, EventBody, Item, MAX_VERSION, Notes, Order, PaymentId, Reason, Status,
    total,
};

/// What a client wants done with an order that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Other items, other notes.
    Update(Update),
    /// On to this status.
    SetStatus(Status),
    /// It is paid for.
    Confirm(PaymentId),
    /// It is called off.
    Cancel(Reason),
}

/// What is to be otherwise; what is not given stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    /// All the lines there are to be, with prices of any number of decimals that some currency has.
    pub items: Option<Vec<Item>>,
    /// `Some(None)` takes the notes away.
    pub notes: Option<Option<Notes>>,
}

/// Why a command is not carried out. The order is as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The order is not in a state that allows it; for people.
    State(String),
    /// These fields do not fit this order: the pointer into the request's body, and what is wrong.
    Fields(Vec<(String, String)>),
}

impl Order {
    /// The event that carries out the command; none if everything is already so.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn decide(
        &self,
        command: &Command,
        event_id: Uuid,
        now: DateTime<Utc>,
    ) -> Result<Option<Event>, Refusal> {
        let body = match command {
            Command::Update(update) => self.update(update)?,
            Command::SetStatus(status) => self.set_status(*status)?,
            Command::Confirm(payment_id) => {
                self.go_to(Status::Confirmed)?;
                Some(EventBody::OrderConfirmed { payment_id: payment_id.clone() })
            }
            Command::Cancel(reason) => {
                self.go_to(Status::Cancelled)?;
                Some(EventBody::OrderCancelled { reason: reason.clone() })
            }
        };
        let Some(body) = body else { return Ok(None) };
        if self.version >= MAX_VERSION {
            return Err(Refusal::State(format!("It has changed {MAX_VERSION} times, which is the most.")));
        }
        let version = self.version + 1;
        // The clocks of two instances differ; an order's own time does not go back.
        let occurred_on = now.max(self.updated_at);
        Ok(Some(Event { event_id, aggregate_id: self.order_id.clone(), occurred_on, version, body }))
    }

    fn update(&self, update: &Update) -> Result<Option<EventBody>, Refusal> {
        let mut details = Details::of(self);
        if let Some(items) = &update.items {
            details.items = priced(items, &self.currency)?;
            details.total_amount = total(&details.items, &self.currency);
        }
        if let Some(notes) = &update.notes {
            details.notes.clone_from(notes);
        }
        if details == Details::of(self) {
            return Ok(None);
        }
        if details.items != self.items && self.status != Status::Created {
            return Err(Refusal::State(format!(
                "Its items change only while it is created, but it is {}.",
                self.status.as_str()
            )));
        }
        if self.status.next().is_empty() {
            return Err(Refusal::State(format!("It is {}, which is final.", self.status.as_str())));
        }
        Ok(Some(EventBody::OrderUpdated { status: self.status, details }))
    }

    fn set_status(&self, status: Status) -> Result<Option<EventBody>, Refusal> {
        if status == self.status {
            return Ok(None);
        }
        let by_another_route = match status {
            Status::Confirmed => Some("is reached by POST /api/orders/{id}/confirm, with a paymentId"),
            Status::Cancelled => Some("is reached by POST /api/orders/{id}/cancel, with a reason"),
            _ => None,
        };
        if let Some(what) = by_another_route {
            return Err(Refusal::Fields(vec![("/status".into(), what.into())]));
        }
        self.go_to(status)?;
        Ok(Some(EventBody::OrderUpdated { status, details: Details::of(self) }))
    }

    fn go_to(&self, status: Status) -> Result<(), Refusal> {
        let (from, to, next) = (self.status.as_str(), status.as_str(), self.status.next());
        if next.contains(&status) {
            return Ok(());
        }
        if status == self.status {
            return Err(Refusal::State(format!("It is {from} already.")));
        }
        let next: Vec<_> = next.iter().map(|s| s.as_str()).collect();
        Err(Refusal::State(match next.as_slice() {
            [] => format!("It is {from}, which is final: it cannot become {to}."),
            next => format!("It is {from}: it cannot become {to}, only {}.", next.join(" or ")),
        }))
    }
}

/// The items with prices as the order's currency has them.
fn priced(items: &[Item], currency: &Currency) -> Result<Vec<Item>, Refusal> {
    let mut wrong = Vec::new();
    let mut priced = items.to_vec();
    for (index, item) in priced.iter_mut().enumerate() {
        match Amount::price(item.price.value(), Some(currency)) {
            Ok(price) => item.price = price,
            Err(what) => wrong.push((format!("/items/{index}/price"), what)),
        }
    }
    if wrong.is_empty() { Ok(priced) } else { Err(Refusal::Fields(wrong)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{CustomerId, ItemName, MenuItemId, NewOrder, OrderId, RestaurantId, parse_decimal};

    fn items(cents: u32) -> Vec<Item> {
        let price = parse_decimal(&format!("{}.{:02}", cents / 100, cents % 100)).unwrap();
        vec![Item {
            menu_item_id: MenuItemId::parse("m").unwrap(),
            name: ItemName::parse("n").unwrap(),
            price: Amount::price(price, None).unwrap(),
            quantity: 2,
        }]
    }

    fn placed() -> Event {
        let new = NewOrder {
            order_id: Some(OrderId::parse("o").unwrap()),
            customer_id: CustomerId::parse("c").unwrap(),
            restaurant_id: RestaurantId::parse("r").unwrap(),
            currency: Currency::default(),
            items: items(150),
            notes: None,
        };
        Event::created(new, Uuid::nil(), DateTime::UNIX_EPOCH)
    }

    fn command() -> impl Strategy<Value = Command> {
        let statuses: Vec<_> = Status::ALL.iter().map(|(status, _)| *status).collect();
        let notes = proptest::option::of(Just(Notes::parse("n").unwrap()));
        prop_oneof![
            (proptest::option::of(0_u32..300), proptest::option::of(notes))
                .prop_map(|(cents, notes)| Command::Update(Update { items: cents.map(items), notes })),
            prop::sample::select(statuses).prop_map(Command::SetStatus),
            Just(Command::Confirm(PaymentId::parse("p").unwrap())),
            Just(Command::Cancel(Reason::parse("r").unwrap())),
        ]
    }

    proptest! {
        /// The naive model knows the ways between the states and nothing else.
        #[test]
        fn events_fold_to_the_state_that_the_commands_made(
            commands in prop::collection::vec((command(), -5_i64..5), 0..40)
        ) {
            let mut events = vec![placed()];
            let mut order = Order::begin(&events[0]).unwrap();
            for (command, seconds) in commands {
                let before = order.clone();
                // The clock may go back.
                let now = order.updated_at + chrono::TimeDelta::seconds(seconds);
                let Ok(Some(event)) = order.decide(&command, Uuid::nil(), now) else { continue };
                order.apply(&event);
                prop_assert_eq!(order.version, before.version + 1);
                prop_assert!(order.updated_at >= before.updated_at);
                if order.status != before.status {
                    let way = format!("{} {}", before.status.as_str(), order.status.as_str());
                    prop_assert!([
                        "created confirmed", "created cancelled", "confirmed cancelled",
                        "confirmed preparing", "preparing ready", "ready delivered",
                    ].contains(&way.as_str()), "{}", way);
                }
                prop_assert!(order.items == before.items || before.status == Status::Created);
                prop_assert_eq!(order.total_amount, total(&order.items, &order.currency));
                prop_assert!(order != before);
                // As it is stored and read again.
                events.push(serde_json::from_value(serde_json::to_value(&event).unwrap()).unwrap());
            }
            let mut folded = Order::begin(&events[0]).unwrap();
            events[1..].iter().for_each(|event| folded.apply(event));
            prop_assert_eq!(folded, order);
        }
    }

    #[test]
    fn who_changes_nothing_writes_nothing() {
        let order = Order::begin(&placed()).unwrap();
        let same = Command::Update(Update { items: Some(items(150)), notes: Some(None) });
        for command in [same, Command::SetStatus(Status::Created), Command::Update(Update::default())] {
            assert_eq!(order.decide(&command, Uuid::nil(), order.updated_at), Ok(None));
        }
    }
}
