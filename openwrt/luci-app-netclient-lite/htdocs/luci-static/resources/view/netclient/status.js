// SPDX-License-Identifier: Apache-2.0
'use strict';
'require view';
'require fs';
'require uci';
'require ui';
'require poll';
'require dom';

function agent(words) {
	return fs.exec('/usr/bin/netclient-lite', words).then(function(done) {
		if (done.code !== 0)
			throw new Error((done.stderr || done.stdout || _('no message')).trim());
		return done.stdout || '';
	});
}

function networks() {
	return agent(['status', '--json']).then(JSON.parse);
}

function since(seconds) {
	return seconds == null ? _('never') : _('%d s ago').format(seconds);
}

function told(promise) {
	ui.showModal(null, [ E('p', { 'class': 'spinning' }, _('Working…')) ]);
	return promise.then(function() {
		ui.hideModal();
		return refresh();
	}).catch(function(bad) {
		ui.hideModal();
		ui.addNotification(null, E('p', bad.message), 'error');
	});
}

function button(text, style, run) {
	return E('button', { 'class': 'btn cbi-button cbi-button-' + style, 'click': run }, text);
}

function confirmed(question, run) {
	ui.showModal(_('Are you sure?'), [
		E('p', question),
		E('div', { 'class': 'right' }, [
			button(_('Cancel'), 'neutral', ui.hideModal), ' ',
			button(_('Leave'), 'negative', run)
		])
	]);
}

function network(entry) {
	var name = entry.network, down = entry.state === 'down';
	var rows = entry.peers.map(function(peer) {
		return E('tr', { 'class': 'tr' }, [
			E('td', { 'class': 'td' }, peer.name),
			E('td', { 'class': 'td' }, peer.address),
			E('td', { 'class': 'td' }, peer.path + (peer.via ? ' ' + _('via %s').format(peer.via) : '')),
			E('td', { 'class': 'td' }, peer.endpoint || '-'),
			E('td', { 'class': 'td' }, since(peer.handshake_age)),
			E('td', { 'class': 'td' }, '%1024mB / %1024mB'.format(peer.rx, peer.tx)),
			E('td', { 'class': 'td' }, peer.why || '')
		]);
	});
	var titles = [ _('Peer'), _('Address'), _('Path'), _('Endpoint'), _('Handshake'), _('Received / sent'), _('Why') ];
	return E('div', { 'class': 'cbi-section' }, [
		E('h3', name),
		E('p', _('%s, %s on %s; server %s').format(entry.node, entry.address || entry.address6 || _('no address yet'), entry.interface, entry.server)
			+ (down ? '; ' + _('taken down') : entry.state !== 'active' ? '; ' + entry.state : '')),
		E('table', { 'class': 'table' }, [
			E('tr', { 'class': 'tr table-titles' }, titles.map(function(title) { return E('th', { 'class': 'th' }, title); }))
		].concat(rows.length ? rows : E('tr', { 'class': 'tr placeholder' }, E('td', { 'class': 'td' }, _('No peers'))))),
		E('div', { 'class': 'right' }, [
			down
				? button(_('Connect'), 'positive', function() { return told(agent(['connect', '-n', name])); })
				: button(_('Disconnect'), 'neutral', function() { return told(agent(['disconnect', '-n', name])); }),
			' ',
			button(_('Leave'), 'negative', function() {
				confirmed(_('This router leaves %s; coming back needs a new token.').format(name), function() {
					return told(agent(['leave', '-n', name]));
				});
			})
		])
	]);
}

function show(found) {
	dom.content(document.getElementById('networks'), found.length ? found.map(network) : E('p', _('No network is joined.')));
}

function refresh() {
	return networks().then(show);
}

// The token goes by UCI, not by a command line, which others could read; the init script joins and removes it.
function join(token, name) {
	var section = uci.add('netclient', 'network');
	uci.set('netclient', section, 'token', token);
	if (name)
		uci.set('netclient', section, 'name', name);
	return uci.save().then(function() { return uci.apply(); }).then(function() {
		return fs.exec('/etc/init.d/netclient', ['kick']);
	}).then(function(done) {
		if (done.code !== 0)
			throw new Error((done.stderr || done.stdout || '').trim());
	});
}

return view.extend({
	load: function() {
		return Promise.all([ networks(), uci.load('netclient') ]);
	},

	render: function(loaded) {
		var token = E('input', { 'class': 'cbi-input-text', 'type': 'password', 'autocomplete': 'off', 'placeholder': _('access token') });
		var name = E('input', { 'class': 'cbi-input-text', 'type': 'text', 'placeholder': _('name of this router') });
		var page = E('div', {}, [
			E('h2', _('WireGuard meshes')),
			E('div', { 'id': 'networks' }),
			E('div', { 'class': 'cbi-section' }, [
				E('h3', _('Join a network')),
				E('p', _('Paste the token that the administrator of the network made (netmaker-lite key add).')),
				token, ' ', name, ' ',
				button(_('Join'), 'positive', function() {
					if (!token.value.trim())
						return ui.addNotification(null, E('p', _('A token is needed.')), 'warning');
					return told(join(token.value.trim(), name.value.trim()).then(function() { token.value = ''; }));
				})
			])
		]);
		window.requestAnimationFrame(function() { show(loaded[0]); });
		poll.add(refresh, 10);
		return page;
	},

	handleSave: null,
	handleSaveApply: null,
	handleReset: null
});
