"""What a preparation made of its text: `shape` is the record in a store, `page` shows it to people, with the figures of `plots`."""
