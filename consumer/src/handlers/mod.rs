//! The order system's handlers, one to a file.

mod acks;
mod fulfillment;
mod messages;
mod notify;
mod order_view;
mod orders;
mod pharmacy;

use crate::offer::Offer;

const ORDER_EVENTS: Option<&str> = Some("order-events");

/// All of them.
pub fn all() -> Vec<Offer> {
    vec![
        Offer::new("pharmacy", ORDER_EVENTS, |_| Ok(pharmacy::Pharmacy)),
        Offer::new("fulfillment", ORDER_EVENTS, |_| Ok(fulfillment::Fulfillment)),
        Offer::new("order-view", ORDER_EVENTS, |_| Ok(order_view::OrderView)),
        Offer::new("messages", None, |setup| Ok(messages::Messages { group: setup.group.to_owned() })),
        Offer::new("notify", ORDER_EVENTS, |setup| notify::Notify::new(setup.settings))
            .checked(|settings| notify::Notify::new(settings).map(drop)),
        Offer::new("acks", Some("order-acks"), |_| Ok(acks::Acks)),
    ]
}
